#include "codec/train/kmeans.h"

#include <faiss/Clustering.h>
#include <faiss/IndexFlat.h>
#include <omp.h>

#include <algorithm>
#include <cstring>
#include <string_view>
#include <unordered_set>
#include <vector>

#include "codec/train/assign.h"

namespace vqkv {
namespace {

// An exhaustive index whose one-nearest search is our assignment: what Clustering::train calls once an iteration.
class AssignIndex final : public faiss::IndexFlatL2 {
 public:
  explicit AssignIndex(int64_t width) : IndexFlatL2(width) {}
  void search(idx_t n, const float* x, idx_t k, float* distances, idx_t* labels,
              const faiss::SearchParameters*) const override {
    VQKV_CHECK(k == 1);
    std::vector<int32_t> index(static_cast<size_t>(n));
    Assigner({get_xb(), ntotal, d}).assign({x, n, d}, index.data());
    std::copy(index.begin(), index.end(), labels);
    std::fill_n(distances, n, 0.0f);  // FAISS only adds them up for a statistic that nobody reads
  }
};

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

  // The subset is drawn here and not by FAISS, so that weights can be brought to mean 1 on it: its split of clusters
  // never ends when every cluster weighs less than 1.
  Rng sampler = rng.split(0);
  const std::vector<int64_t> rows = sampler.sample(x.rows, entries * options.points_per_codeword);
  const auto n = static_cast<int64_t>(rows.size());
  Matrix<float> points(n, x.cols);
  std::vector<float> weights(weight.empty() ? 0 : rows.size());
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    std::copy_n(x.row(rows[static_cast<size_t>(i)]), x.cols, points.row(i));
    if (!weight.empty())
      sum += weights[static_cast<size_t>(i)] = weight[static_cast<size_t>(rows[static_cast<size_t>(i)])];
  }
  if (sum > 0)
    for (float& w : weights) w = static_cast<float>(w * static_cast<double>(n) / sum);
  else
    weights.clear();

  faiss::ClusteringParameters parameters;  // every number that matters is ours: the defaults subsample and warn
  parameters.niter = options.iterations;
  parameters.nredo = 1;
  parameters.min_points_per_centroid = 1;
  parameters.max_points_per_centroid = static_cast<int>(n / entries + 1);
  parameters.seed = static_cast<int>(rng.split(1).key() & 0x7fffffff);
  parameters.verbose = false;
  faiss::Clustering clustering(static_cast<int>(x.cols), static_cast<int>(entries), parameters);
  AssignIndex index(x.cols);
  omp_set_num_threads(1);  // two OpenMP threads made FAISS 2.5 to 7 times slower here; the parallel part is our own
  clustering.train(n, points.data(), index, weights.empty() ? nullptr : weights.data());
  std::copy(clustering.centroids.begin(), clustering.centroids.end(), result.codewords.storage.begin());
  result.points = n;
  result.iterations = options.iterations;
  return result;
}

}  // namespace vqkv
