#include "codec/train/kmeans.h"

#include <algorithm>
#include <numeric>
#include <random>
#include <string_view>
#include <unordered_set>
#include <utility>
#include <vector>

#include "codec/train/assign.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "codec/train/kmeans.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace vqkv {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

template <int kLanes>
void add_weighted(ConstMatrix x, const float* weight, const int32_t* index, float* sum) {
  const hn::CappedTag<float, kLanes> d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  for (int64_t r = 0; r < x.rows; ++r) {
    const float *from = x.row(r), factor = weight ? weight[r] : 1.0f;
    float* to = sum + index[r] * x.cols;
    int64_t k = 0;
    for (; k + lanes <= x.cols; k += lanes)
      hn::StoreU(hn::Add(hn::LoadU(d, to + k), hn::Mul(hn::LoadU(d, from + k), hn::Set(d, factor))), d, to + k);
    for (; k < x.cols; ++k) to[k] += from[k] * factor;
  }
}

// sum (entries, x.cols) += the rows of each codeword, weighted (1 where weight is null): in row order, in fp32 and
// without a fused multiply-add, as FAISS adds them.
void add_by_codeword(ConstMatrix x, const float* weight, const int32_t* index, float* sum) {
  if (x.cols >= 16) return add_weighted<16>(x, weight, index, sum);
  if (x.cols >= 8) return add_weighted<8>(x, weight, index, sum);
  if (x.cols >= 4) return add_weighted<4>(x, weight, index, sum);
  add_weighted<2>(x, weight, index, sum);
}

}  // namespace HWY_NAMESPACE
}  // namespace vqkv
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace vqkv {
HWY_EXPORT(add_by_codeword);

namespace {

// mt19937 has the same numbers in every library, the distributions of <random> do not.
uint32_t below(std::mt19937& random, int64_t n) { return static_cast<uint32_t>(random()) % static_cast<uint32_t>(n); }

// Random rows of x, one a codeword, none of them twice.
Matrix<float> random_rows(ConstMatrix x, int64_t entries, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<int32_t> order(static_cast<size_t>(x.rows));
  std::iota(order.begin(), order.end(), 0);
  Matrix<float> out(entries, x.cols);
  for (int64_t s = 0; s < entries; ++s) {  // a shuffle, as far as it is needed
    std::swap(order[static_cast<size_t>(s)], order[static_cast<size_t>(s + below(random, x.rows - s))]);
    std::copy_n(x.row(order[static_cast<size_t>(s)]), x.cols, out.row(s));
  }
  return out;
}

// Every codeword without rows (mass 0) becomes a copy of one that has some, the two a little apart, with half of its
// mass each. Which one is drawn, those of much mass more often; the same draws in every round.
void split_heavy(int64_t rows, std::vector<float>& mass, Matrix<float>& codewords) {
  constexpr double kApart = 1.0 / 1024;
  const auto entries = static_cast<int64_t>(mass.size());
  std::mt19937 random(1234);
  for (int64_t s = 0; s < entries; ++s) {
    float& own = mass[static_cast<size_t>(s)];
    if (own != 0) continue;
    int64_t heavy = 0;
    const auto chosen = [&] {
      const auto chance =
          static_cast<float>((mass[static_cast<size_t>(heavy)] - 1.0) / static_cast<float>(rows - entries));
      return static_cast<float>(random()) / static_cast<float>(std::mt19937::max()) < chance;
    };
    while (!chosen()) heavy = (heavy + 1) % entries;
    for (int64_t k = 0; k < codewords.cols; ++k) {
      const double shift = k % 2 == 0 ? kApart : -kApart, at = codewords(heavy, k);
      codewords(s, k) = static_cast<float>(at * (1 + shift));
      codewords(heavy, k) = static_cast<float>(at * (1 - shift));
    }
    own = mass[static_cast<size_t>(heavy)] / 2;
    mass[static_cast<size_t>(heavy)] -= own;
  }
}

// Lloyd's rounds over x (rows > entries), bit for bit those of faiss::Clustering (test_kmeans.cpp holds them together).
// What its rounds do beside assignment was 7 % of the quickstart's sweep (perf record), and is 2 % of it here.
Matrix<float> lloyd(ConstMatrix x, const float* weight, int64_t entries, int iterations, uint32_t seed) {
  Matrix<float> codewords = random_rows(x, entries, seed);
  std::vector<int32_t> index(static_cast<size_t>(x.rows));
  std::vector<float> mass(static_cast<size_t>(entries));
  for (int i = 0; i < iterations; ++i) {
    Assigner(codewords).assign(x, index.data());
    std::fill(mass.begin(), mass.end(), 0.0f);
    for (int64_t r = 0; r < x.rows; ++r)
      mass[static_cast<size_t>(index[static_cast<size_t>(r)])] += weight ? weight[r] : 1.0f;
    std::fill(codewords.storage.begin(), codewords.storage.end(), 0.0f);
    HWY_DYNAMIC_DISPATCH(add_by_codeword)(x, weight, index.data(), codewords.data());
    for (int64_t s = 0; s < entries; ++s) {
      if (mass[static_cast<size_t>(s)] == 0) continue;
      const float share = 1 / mass[static_cast<size_t>(s)];
      for (int64_t k = 0; k < x.cols; ++k) codewords(s, k) *= share;
    }
    split_heavy(x.rows, mass, codewords);
  }
  return codewords;
}

// The first rows that are distinct, at most limit + 1 of them.
std::vector<int64_t> distinct_rows(ConstMatrix x, int64_t limit) {
  std::vector<int64_t> first;
  std::unordered_set<std::string_view> seen;
  for (int64_t r = 0; r < x.rows && static_cast<int64_t>(first.size()) <= limit; ++r) {
    const std::string_view bytes(reinterpret_cast<const char*>(x.row(r)), static_cast<size_t>(x.cols) * sizeof(float));
    if (seen.insert(bytes).second) first.push_back(r);
  }
  return first;
}

}  // namespace

KmeansResult kmeans(ConstMatrix x, std::span<const float> weight, int64_t entries, const KmeansOptions& options,
                    const Rng& rng) {
  VQKV_CHECK(x.rows >= 1 && x.cols >= 1 && entries >= 1 && options.iterations >= 1 && options.points_per_codeword >= 1);
  VQKV_CHECK(weight.empty() || static_cast<int64_t>(weight.size()) == x.rows);
  KmeansResult result;
  result.codewords = Matrix<float>(entries, x.cols);

  const std::vector<int64_t> distinct = distinct_rows(x, entries);
  if (static_cast<int64_t>(distinct.size()) <= entries) {
    for (int64_t s = 0; s < entries; ++s)
      std::copy_n(x.row(distinct[static_cast<size_t>(s) % distinct.size()]), x.cols, result.codewords.row(s));
    result.points = x.rows;
    result.repeated = entries - static_cast<int64_t>(distinct.size());
    return result;
  }

  Rng sampler = rng.split(0);
  const std::vector<int64_t> rows = sampler.sample(x.rows, entries * options.points_per_codeword);
  const auto n = static_cast<int64_t>(rows.size());
  Matrix<float> subset(n < x.rows ? n : 0, x.cols);
  for (int64_t i = 0; i < subset.rows; ++i) std::copy_n(x.row(rows[static_cast<size_t>(i)]), x.cols, subset.row(i));
  const ConstMatrix points = n < x.rows ? subset.view() : x;
  // Weights of mean 1: split_heavy never ends when every codeword weighs less than 1.
  std::vector<float> weights(weight.empty() ? 0 : rows.size());
  double sum = 0;
  for (size_t i = 0; i < weights.size(); ++i) sum += weights[i] = weight[static_cast<size_t>(rows[i])];
  if (sum > 0)
    for (float& w : weights) w = static_cast<float>(w * static_cast<double>(n) / sum);
  else
    weights.clear();
  result.points = n;
  result.iterations = options.iterations;
  if (n > entries)
    result.codewords = lloyd(points, weights.empty() ? nullptr : weights.data(), entries, options.iterations,
                             static_cast<uint32_t>(rng.split(1).key() & 0x7fffffff) + 1);
  else
    for (int64_t s = 0; s < n; ++s) std::copy_n(points.row(s), x.cols, result.codewords.row(s));
  return result;
}

}  // namespace vqkv
#endif
