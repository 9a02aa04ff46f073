#include "codec/train/kmeans.h"

#include <faiss/Clustering.h>
#include <faiss/IndexFlat.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "codec/train/assign.h"
#include "codec/vq_support.h"
#include "core/thread_pool.h"
#include "support/catch.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

double mean_error(const Matrix<float>& x, const Matrix<float>& codewords) {
  std::vector<int32_t> index(static_cast<size_t>(x.rows));
  std::vector<float> distance(index.size());
  Assigner(codewords).assign(x, index.data(), distance.data());
  return std::accumulate(distance.begin(), distance.end(), 0.0) / static_cast<double>(x.rows * x.cols);
}

// One-nearest search by our assignment: what faiss::Clustering calls once a round.
class AssignIndex final : public faiss::IndexFlatL2 {
 public:
  explicit AssignIndex(int64_t width) : IndexFlatL2(width) {}
  void search(idx_t n, const float* x, idx_t, float* distances, idx_t* labels,
              const faiss::SearchParameters*) const override {
    std::vector<int32_t> index(static_cast<size_t>(n));
    Assigner({get_xb(), ntotal, d}).assign({x, n, d}, index.data());
    std::copy(index.begin(), index.end(), labels);
    std::fill_n(distances, n, 0.0f);
  }
};

// Codewords that FAISS trains on all rows of x; weight: of mean 1, or empty.
std::vector<float> by_faiss(const Matrix<float>& x, const std::vector<float>& weight, int entries, int iterations,
                            const Rng& rng) {
  faiss::ClusteringParameters parameters;
  parameters.niter = iterations;
  parameters.min_points_per_centroid = 1;
  parameters.max_points_per_centroid = static_cast<int>(x.rows);
  parameters.seed = static_cast<int>(rng.split(1).key() & 0x7fffffff);
  faiss::Clustering clustering(static_cast<int>(x.cols), entries, parameters);
  AssignIndex index(x.cols);
  clustering.train(x.rows, x.data(), index, weight.empty() ? nullptr : weight.data());
  return clustering.centroids;
}

}  // namespace

TEST_CASE("k-means has the bits of FAISS's rounds around the same assignment", "[kmeans]") {
  const auto check = [](const Matrix<float>& x, const std::vector<float>& weight, int entries) {
    const AlignedVector<float> ours = kmeans(x, weight, entries, {6, 2000}, Rng(2)).codewords.storage;
    CHECK(std::vector<float>(ours.begin(), ours.end()) == by_faiss(x, weight, entries, 6, Rng(2)));
  };
  for (const int64_t width : {1, 2, 3, 4, 7, 8, 16, 37, 64}) {
    CAPTURE(width);
    const auto x = gaussian(1500, width, 11);
    check(x, {}, 40);
    std::vector<float> weight(1500);
    for (size_t r = 0; r < weight.size(); ++r) weight[r] = r % 3 == 0 ? 0.0f : r % 3 == 1 ? 0.5f : 2.5f;  // mean 1
    check(x, weight, 40);
    // Rows that repeat 60 others: most of 50 random codewords share theirs, so clusters stay empty and others split.
    Matrix<float> repeated(1500, width);
    for (int64_t r = 0; r < 1500; ++r) std::copy_n(x.row(r * r % 60), width, repeated.row(r));
    for (int64_t r = 0; r < 60; ++r) std::copy_n(x.row(r), width, repeated.row(r));
    check(repeated, {}, 50);
    check(repeated, weight, 50);
  }
}

TEST_CASE("k-means reaches the Lloyd-Max distortion of a Gaussian", "[kmeans]") {
  // Optimal 4-level and 8-level scalar quantizers of N(0, 1): 0.1175 and 0.03455 (Max, 1960).
  const auto x = gaussian(40000, 1, 7);
  CHECK(mean_error(x, kmeans(x, {}, 4, {50, 100000}, Rng(1)).codewords) == Approx(0.1175).epsilon(0.02));
  CHECK(mean_error(x, kmeans(x, {}, 8, {100, 100000}, Rng(1)).codewords) == Approx(0.03455).epsilon(0.03));
}

TEST_CASE("k-means finds well separated clusters and keeps every codeword in use", "[kmeans]") {
  Rng rng(3);
  Matrix<float> x(3000, 6);
  for (int64_t r = 0; r < x.rows; ++r)
    for (int64_t k = 0; k < 6; ++k)
      x(r, k) = static_cast<float>(20.0 * static_cast<double>((r % 8) >> (k / 2) & 1) + 0.01 * rng.normal());
  const auto result = kmeans(x, {}, 64, {30, 256}, Rng(2));
  CHECK(mean_error(x, result.codewords) < 0.01);
  std::vector<int32_t> index(3000), used(64, 0);
  Assigner(result.codewords).assign(x, index.data());
  for (const int32_t i : index) used[static_cast<size_t>(i)] = 1;
  CHECK(std::accumulate(used.begin(), used.end(), 0) >= 60);
  CHECK(result.points == 3000);
}

TEST_CASE("fewer distinct rows than codewords: the rows themselves, repeated", "[kmeans]") {
  Matrix<float> x(100, 3);
  for (int64_t r = 0; r < 100; ++r)
    for (int64_t k = 0; k < 3; ++k) x(r, k) = static_cast<float>((r % 5) * 10 + k);
  const auto result = kmeans(x, {}, 8, {}, Rng(1));
  CHECK(result.repeated == 3);
  CHECK(result.iterations == 0);
  for (int64_t s = 0; s < 8; ++s) CHECK(result.codewords(s, 1) == static_cast<float>((s % 5) * 10 + 1));
  const auto one = kmeans(x.view().slice_rows(0, 1), {}, 16, {}, Rng(1));
  CHECK(one.repeated == 15);
}

TEST_CASE("weights move the codewords, and most of them may be zero", "[kmeans]") {
  const auto x = gaussian(4000, 2, 5);
  std::vector<float> weight(4000, 0.0f);
  for (size_t r = 0; r < 100; ++r) weight[r] = 1.0f;
  const auto weighted = kmeans(x, weight, 16, {25, 256}, Rng(1)).codewords;
  const auto plain = kmeans(x, {}, 16, {25, 256}, Rng(1)).codewords;
  Matrix<float> heavy(100, 2);
  std::copy_n(x.data(), 200, heavy.data());
  CHECK(mean_error(heavy, weighted) < 0.8 * mean_error(heavy, plain));
  std::fill(weight.begin(), weight.end(), 3.0f);
  CHECK(kmeans(x, weight, 16, {25, 256}, Rng(1)).codewords.storage == plain.storage);
}

TEST_CASE("the subset bounds what is trained on", "[kmeans]") {
  const auto x = gaussian(5000, 4, 5);
  CHECK(kmeans(x, {}, 16, {5, 50}, Rng(1)).points == 800);
  CHECK(kmeans(x, {}, 16, {5, 1}, Rng(1)).points == 16);
}

TEST_CASE("k-means gives the same bits at 1 and 2 threads, wide rows too", "[kmeans]") {
  for (const int64_t width : {8, 128, 4864}) {
    const auto x = gaussian(width > 1000 ? 300 : 3000, width, 9);
    const int before = thread_count();
    set_thread_count(1);
    const auto one = kmeans(x, {}, 32, {5, 256}, Rng(4));
    set_thread_count(2);
    const auto two = kmeans(x, {}, 32, {5, 256}, Rng(4));
    set_thread_count(before);
    CHECK(one.codewords.storage == two.codewords.storage);
    CHECK(kmeans(x, {}, 32, {5, 256}, Rng(5)).codewords.storage != one.codewords.storage);
  }
}
