// Assignment and encoding throughput, one thread. Items are vectors; GF/s counts 2 * entries * width a codeword search.
#include <benchmark/benchmark.h>

#include <algorithm>

#include <string>
#include <vector>

#include "codec/train/assign.h"
#include "codec/train/commvq.h"
#include "core/gemm.h"
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

// Product code: `groups` books of `entries` codewords over d = 128 channels, all groups of a row.
void product(benchmark::State& state) {
  const int64_t groups = state.range(0), entries = state.range(1), rows = 4096, width = 128 / groups;
  set_thread_count(1);
  const auto x = gaussian(rows, 128, 1);
  std::vector<Assigner> books;
  for (int64_t g = 0; g < groups; ++g) books.emplace_back(gaussian(entries, width, 2 + static_cast<uint64_t>(g)));
  std::vector<int32_t> index(64);
  for (auto _ : state) {
    for (int64_t r = 0; r < rows; r += 64)
      for (int64_t g = 0; g < groups; ++g) {
        books[static_cast<size_t>(g)].assign_rows(x.view().slice_rows(r, 64).slice_cols(g * width, width),
                                                  index.data());
        benchmark::DoNotOptimize(index.data());
      }
  }
  state.SetItemsProcessed(state.iterations() * rows);
  state.counters["GF/s"] = benchmark::Counter(2e-9 * 128.0 * static_cast<double>(entries * rows),
                                              benchmark::Counter::kIsIterationInvariantRate);
}
BENCHMARK(product)->Args({8, 256})->Args({16, 256})->Args({32, 256})->Args({64, 16})->Unit(benchmark::kMillisecond);

// One codebook over the whole vector, as a residual stage or k-means sees it.
void full(benchmark::State& state) {
  const int64_t width = state.range(0), entries = state.range(1), rows = 4096;
  set_thread_count(1);
  const auto x = gaussian(rows, width, 1);
  const Assigner book(gaussian(entries, width, 2));
  std::vector<int32_t> index(static_cast<size_t>(rows));
  for (auto _ : state) book.assign(x, index.data());
  state.SetItemsProcessed(state.iterations() * rows);
  state.counters["GF/s"] = benchmark::Counter(2e-9 * static_cast<double>(width * entries * rows),
                                              benchmark::Counter::kIsIterationInvariantRate);
}
BENCHMARK(full)
    ->Args({32, 2048})
    ->Args({64, 256})
    ->Args({128, 256})
    ->Args({128, 1024})
    ->Args({128, 4096})
    ->Args({512, 1024})
    ->Args({4864, 256})
    ->Unit(benchmark::kMillisecond);

// A stage of CommVQ's keys, d = 128: all 64 x 64 sums of a book, which the exhaustive search above takes as 4,096
// codewords.
void pairs(benchmark::State& state) {
  const int64_t rows = 4096;
  set_thread_count(1);
  const auto x = gaussian(rows, 128, 1);
  const PairQuantizer stage({gaussian(64, 128, 2)});
  std::vector<uint16_t> first(static_cast<size_t>(rows)), second(first);
  for (auto _ : state) stage.encode_rows(x, first.data(), second.data(), 1, 1);
  state.SetItemsProcessed(state.iterations() * rows);
}
BENCHMARK(pairs)->Unit(benchmark::kMillisecond);

// Rows as a book sees that was fitted to them: near sums of its codewords, at a fifth of their length.
void pairs_fitted(benchmark::State& state) {
  const int64_t rows = 4096, entries = 64, width = 128;
  set_thread_count(1);
  Matrix<float> x = gaussian(rows, width, 1);
  const Matrix<float> book = gaussian(entries, width, 2);
  for (int64_t r = 0; r < rows; ++r) {
    const float *a = book.row(r * 7 % entries), *b = book.row((3 * r + r / entries) % entries);
    for (int64_t c = 0; c < width; ++c)
      x(r, c) = 0.28f * x(r, c) + a[c] + (c < width / 2 ? -b[c + width / 2] : b[c - width / 2]);
  }
  const PairQuantizer stage({book});
  std::vector<uint16_t> first(static_cast<size_t>(rows)), second(first);
  for (auto _ : state) stage.encode_rows(x, first.data(), second.data(), 1, 1);
  state.SetItemsProcessed(state.iterations() * rows);
}
BENCHMARK(pairs_fitted)->Unit(benchmark::kMillisecond);

// The same as the authors search: products with all 4,096 sums of a book, of which the nearest is taken away.
void pairs_exhaustive(benchmark::State& state) {
  const int64_t rows = 4096, entries = 64, width = 128;
  set_thread_count(1);
  const auto x = gaussian(rows, width, 1), book = gaussian(entries, width, 2);
  Matrix<float> sums(entries * entries, width);
  std::vector<float> norms;
  for (int64_t s = 0; s < sums.rows; ++s) {
    const float *a = book.row(s / entries), *b = book.row(s % entries);
    float norm = 0;
    for (int64_t c = 0; c < width; ++c) {
      sums(s, c) = a[c] + (c < width / 2 ? -b[c + width / 2] : b[c - width / 2]);
      norm += sums(s, c) * sums(s, c);
    }
    norms.push_back(norm);
  }
  constexpr int64_t kAtOnce = 64;
  Matrix<float> product(kAtOnce, sums.rows), rest(kAtOnce, width);
  for (auto _ : state)
    for (int64_t first = 0; first < rows; first += kAtOnce) {
      gemm(x.view().slice_rows(first, kAtOnce), sums, true, product);
      for (int64_t r = 0; r < kAtOnce; ++r) {
        float* score = product.row(r);
        for (int64_t s = 0; s < sums.rows; ++s) score[s] = norms[static_cast<size_t>(s)] - 2 * score[s];
        const float* nearest = sums.row(std::min_element(score, score + sums.rows) - score);
        for (int64_t c = 0; c < width; ++c) rest(r, c) = x(first + r, c) - nearest[c];
      }
      benchmark::DoNotOptimize(rest.data());
    }
  state.SetItemsProcessed(state.iterations() * rows);
}
BENCHMARK(pairs_exhaustive)->Unit(benchmark::kMillisecond);

}  // namespace

BENCHMARK_MAIN();
