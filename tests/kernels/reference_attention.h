// Attention of one query in double, numerators and denominator apart: divided in fp32, as kernels do, so that what is
// exact until then comes out bit for bit.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

namespace vqkv {

// out (dim) of a query (dim), times log2(e), over tokens [0, n): key(t, c), value(t, c). The spread of its scores.
template <class Key, class Value>
double reference_attention(const float* query, int n, int dim, Key key, Value value, float* out) {
  std::vector<double> score(static_cast<size_t>(n)), top(static_cast<size_t>(dim));
  for (int t = 0; t < n; ++t)
    for (int c = 0; c < dim; ++c) score[static_cast<size_t>(t)] += double{query[c]} * double{key(t, c)};
  const auto [low, high] = std::minmax_element(score.begin(), score.end());
  double sum = 0;
  for (int t = 0; t < n; ++t) {
    const double weight = std::exp2(score[static_cast<size_t>(t)] - *high);
    sum += weight;
    for (int c = 0; c < dim; ++c) top[static_cast<size_t>(c)] += weight * double{value(t, c)};
  }
  for (int c = 0; c < dim; ++c) out[c] = static_cast<float>(top[static_cast<size_t>(c)]) / static_cast<float>(sum);
  return *high - *low;
}

}  // namespace vqkv
