// Training and residual encoding, one thread. Items of encode are vectors; of kmeans, vectors times iterations. The
// pair `kmeans_plain` is FAISS's own training, in the same process.
#include <benchmark/benchmark.h>
#include <dlfcn.h>
#include <faiss/Clustering.h>
#include <faiss/IndexFlat.h>
#include <omp.h>

#include <vector>

#include "codec/codec.h"
#include "codec/train/kmeans.h"
#include "codec/train/residual.h"
#include "codec/train/simvq.h"
#include "core/rng.h"
#include "core/thread_pool.h"

namespace {

using namespace vqkv;

Matrix<float> gaussian(int64_t rows, int64_t cols, uint64_t key) {
  Matrix<float> m(rows, cols);
  Rng rng(key);
  for (auto& v : m.storage) v = static_cast<float>(rng.normal());
  return m;
}

constexpr int kIterations = 5;

void kmeans_ours(benchmark::State& state) {
  set_thread_count(1);
  const auto x = gaussian(65536, state.range(0), 1);
  for (auto _ : state)
    benchmark::DoNotOptimize(kmeans(x, {}, state.range(1), {kIterations, 65536}, Rng(1)).codewords.data());
  state.SetItemsProcessed(state.iterations() * kIterations * x.rows);
}

void kmeans_plain(benchmark::State& state) {
  omp_set_num_threads(1);
  using Setter = void (*)(int);
  if (const auto set = reinterpret_cast<Setter>(dlsym(RTLD_DEFAULT, "openblas_set_num_threads"))) set(1);
  const auto x = gaussian(65536, state.range(0), 1);
  for (auto _ : state) {
    faiss::ClusteringParameters parameters;
    parameters.niter = kIterations;
    parameters.min_points_per_centroid = 1;
    parameters.max_points_per_centroid = 65536;
    faiss::Clustering clustering(static_cast<int>(x.cols), static_cast<int>(state.range(1)), parameters);
    faiss::IndexFlatL2 index(x.cols);
    clustering.train(x.rows, x.data(), index);
    benchmark::DoNotOptimize(clustering.centroids.data());
  }
  state.SetItemsProcessed(state.iterations() * kIterations * x.rows);
}

// width, codewords: a product code's sub-vectors, one head's residual stage, VQKV's keys.
#define KMEANS_SHAPES \
  Args({4, 256})->Args({8, 256})->Args({64, 256})->Args({128, 256})->Args({128, 1024})->Unit(benchmark::kMillisecond)
BENCHMARK(kmeans_ours)->KMEANS_SHAPES;
BENCHMARK(kmeans_plain)->KMEANS_SHAPES;

// stages, codewords, beam at d = 128.
void residual(benchmark::State& state) {
  set_thread_count(1);
  const int64_t stages = state.range(0), entries = state.range(1), rows = 4096;
  ResidualOptions options;
  options.stages = static_cast<int>(stages);
  options.entries = entries;
  options.kmeans = {2, 16};
  const ResidualQuantizer quantizer(train_residual(gaussian(16384, 128, 2), {}, options, Rng(1)).quantizer.books(),
                                    static_cast<int>(state.range(2)));
  const auto x = gaussian(rows, 128, 1);
  std::vector<uint16_t> codes(static_cast<size_t>(rows * stages));
  for (auto _ : state) quantizer.encode(x, codes.data());
  state.SetItemsProcessed(state.iterations() * rows);
}
BENCHMARK(residual)
    ->Args({8, 256, 1})
    ->Args({8, 256, 2})
    ->Args({8, 256, 5})
    ->Args({16, 256, 1})
    ->Args({16, 256, 5})
    ->Args({56, 1024, 1})
    ->Unit(benchmark::kMillisecond);

// One stage of VQKV's keys at head_dim 64, 20 rounds of least squares on 32 vectors a codeword.
void simvq_stage(benchmark::State& state) {
  set_thread_count(1);
  const auto x = gaussian(32768, 64, 1);
  SimVqOptions options;
  options.stages = 1;
  options.rounds = 20;
  options.points_per_codeword = 32;
  for (auto _ : state) benchmark::DoNotOptimize(train_simvq(x, {}, options, Rng(1)).curve.data());
}
BENCHMARK(simvq_stage)->Unit(benchmark::kMillisecond);

// One codec of a head of 64 channels, trained on 8,192 tokens.
void codec(benchmark::State& state, const char* method, const char* knobs) {
  set_thread_count(1);
  UnitShape unit;
  unit.head_dim = 64;
  const auto x = gaussian(8192, 64, 1);
  TrainSet set;
  set.x = x;
  set.head_dim = 64;
  for (auto _ : state) {
    const auto made = find_method(method).make(Json::parse(knobs), unit);
    benchmark::DoNotOptimize(made->train(set, Rng(1)).iterations);
  }
}
BENCHMARK_CAPTURE(codec, pq_16x256, "pq", R"({"codebooks": 16})")->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(codec, rvq_8x256_beam4, "rvq", R"({"codebooks": 8})")->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(codec, rvq_16x256_beam5, "rvq", R"({"codebooks": 16, "beam": 5})")->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(codec, kumar, "kumar", "{}")->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(codec, simvq_28x1024, "simvq", "{}")->Unit(benchmark::kMillisecond);

}  // namespace

BENCHMARK_MAIN();
