#include "codec/linear_map.h"

#include "core/error.h"

namespace vqkv {

std::vector<double> dense_of(const LinearMap& map, int rows, int cols) {
  if (!map.dense.empty()) {
    VQKV_CHECK(map.dense.size() == static_cast<size_t>(rows) * static_cast<size_t>(cols));
    return {map.dense.begin(), map.dense.end()};
  }
  VQKV_CHECK(rows == cols);
  std::vector<double> out(static_cast<size_t>(rows) * static_cast<size_t>(cols), 0.0);
  for (int i = 0; i < rows; ++i)
    out[static_cast<size_t>(i) * static_cast<size_t>(cols + 1)] =
        map.diagonal.empty() ? 1.0 : double{map.diagonal[static_cast<size_t>(i)]};
  return out;
}

std::vector<float> apply(const LinearMap& map, const std::vector<float>& v, int cols) {
  if (map.identity()) return v;
  std::vector<float> out(static_cast<size_t>(cols));
  for (int j = 0; j < cols; ++j) {
    const auto c = static_cast<size_t>(j);
    if (!map.diagonal.empty()) {
      out[c] = v[c] * map.diagonal[c];
      continue;
    }
    double sum = 0;
    for (size_t i = 0; i < v.size(); ++i) sum += double{v[i]} * map.dense[i * static_cast<size_t>(cols) + c];
    out[c] = static_cast<float>(sum);
  }
  return out;
}

int64_t stored_bytes(const LinearMap& map) {
  if (map.stored_bytes >= 0) return map.stored_bytes;
  return static_cast<int64_t>((map.diagonal.size() + map.dense.size()) * sizeof(float));
}

LinearMap compose(const LinearMap& first, const LinearMap& second, int rows, int middle, int cols) {
  if (first.identity()) return second;
  if (second.identity()) return first;
  LinearMap out;
  out.stored_bytes = stored_bytes(first) + stored_bytes(second);
  if (!first.diagonal.empty() && !second.diagonal.empty()) {
    out.diagonal.resize(first.diagonal.size());
    for (size_t i = 0; i < out.diagonal.size(); ++i) out.diagonal[i] = first.diagonal[i] * second.diagonal[i];
    return out;
  }
  const std::vector<double> a = dense_of(first, rows, middle), b = dense_of(second, middle, cols);
  std::vector<double> c(static_cast<size_t>(rows) * static_cast<size_t>(cols), 0.0);
  for (int i = 0; i < rows; ++i)
    for (int m = 0; m < middle; ++m) {
      const double v = a[static_cast<size_t>(i) * static_cast<size_t>(middle) + static_cast<size_t>(m)];
      if (v == 0) continue;  // maps are block-diagonal by head
      const double* row = b.data() + static_cast<size_t>(m) * static_cast<size_t>(cols);
      double* to = c.data() + static_cast<size_t>(i) * static_cast<size_t>(cols);
      for (int j = 0; j < cols; ++j) to[j] += v * row[j];
    }
  out.dense.assign(c.begin(), c.end());
  return out;
}

}  // namespace vqkv
