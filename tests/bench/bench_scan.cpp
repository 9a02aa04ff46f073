// Scoring of coded keys, one thread: table scans of product codes against reconstruction, and the multiply kernel that
// all attention runs on; adding up probabilities by code. Lookups (and adds) are (row, token, slot).
#include <benchmark/benchmark.h>

#include "attention/kernels_cpu.h"
#include "attention/scan_cpu.h"
#include "cache/decode_cpu.h"
#include "core/cpu.h"
#include "core/rng.h"
#include "core/small_matrix.h"
#include "core/thread_pool.h"

namespace {

using namespace vqkv;

constexpr int64_t kRuns = 1024;  // of 64 tokens: 1 MiB of codes at 16 slots, beyond L1

struct Data {
  Matrix<float> lut;
  AlignedVector<float> beside;  // the same table for `lanes` rows beside each other: (slots, 256, lanes)
  scan::FixedTables tables;
  scan::ByteTables bytes;
  std::vector<uint8_t> codes;
  std::vector<uint16_t> wide;
  Data(int64_t slots, int64_t entries, int64_t lanes) : lut(slots, 256) {
    Rng rng(1);
    for (float& v : lut.storage) v = static_cast<float>(0.01 * rng.normal());
    beside.resize(static_cast<size_t>(slots * 256 * lanes));
    for (size_t i = 0; i < beside.size(); ++i) beside[i] = lut.storage[i / static_cast<size_t>(lanes)];
    scan::quantize(lut.data(), slots, entries, 256, tables);
    scan::quantize(lut.data(), slots, entries, 256, bytes);
    codes.resize(static_cast<size_t>(kRuns * slots * 64));
    wide.resize(codes.size());
    for (size_t i = 0; i < codes.size(); ++i)
      wide[i] = codes[i] = static_cast<uint8_t>(rng.below(static_cast<uint64_t>(entries)));
  }
};

// Four runs a call, as a chunk of a cache gives them. Arguments: slots, entries, rows.
template <class Body>
void run(benchmark::State& state, Body&& body) {
  const int64_t slots = state.range(0), rows = state.range(2);
  const Data data(slots, state.range(1), rows);
  alignas(64) float out[4 * 64 * 16];
  for (auto _ : state) {
    for (int64_t r = 0; r < kRuns; r += 4) {
      const uint8_t* runs[4];
      for (int64_t n = 0; n < 4; ++n) runs[n] = data.codes.data() + (r + n) * slots * 64;
      body(data, runs, r * slots * 64, slots, out);
      benchmark::DoNotOptimize(out);
    }
  }
  state.counters["lookups/s"] =
      benchmark::Counter(static_cast<double>(rows * kRuns * slots * 64), benchmark::Counter::kIsIterationInvariantRate);
}

void scan_fixed16(benchmark::State& state) {
  if (!cpu_features().avx2) return state.SkipWithError("needs AVX2");
  run(state, [](const Data& d, const uint8_t* const* runs, int64_t, int64_t slots, float* out) {
    scan::fixed(d.tables, runs, 4, slots, out);
  });
}

void scan_bytes8(benchmark::State& state) {
  if (!cpu_features().avx2) return state.SkipWithError("needs AVX2");
  run(state, [](const Data& d, const uint8_t* const* runs, int64_t, int64_t slots, float* out) {
    scan::bytes(d.bytes, runs, 4, slots, out);
  });
}

// fp32 tables by gathers.
void scan_gather(benchmark::State& state) {
  run(state, [](const Data& d, const uint8_t* const*, int64_t at, int64_t slots, float* out) {
    for (int64_t n = 0; n < 4; ++n)
      for (int64_t s = 0; s < slots; ++s)
        kernels::decode_levels(d.wide.data() + at + (n * slots + s) * 64, 64, d.lut.row(s), 0.0f, nullptr, nullptr,
                               out + 64 * n, s > 0);
  });
}

// fp32 tables of several rows beside each other: one load a code for all of them.
void scan_fp32_rows(benchmark::State& state) {
  const int64_t lanes = state.range(2);
  run(state, [&](const Data& d, const uint8_t* const*, int64_t at, int64_t slots, float* out) {
    for (int64_t n = 0; n < 4; ++n)
      kernels::sum_by_code(d.beside.data(), 256 * lanes, lanes, d.wide.data() + at + n * slots * 64, 64, slots, 64,
                           out + 64 * lanes * n);
  });
}

// The other way: probabilities of several rows added up by code.
void sums_by_code(benchmark::State& state) {
  const int64_t lanes = state.range(2);
  AlignedVector<float> sums(static_cast<size_t>(state.range(0) * 256 * lanes));
  const AlignedVector<float> weights(static_cast<size_t>(64 * lanes), 0.5f);
  run(state, [&](const Data& d, const uint8_t* const*, int64_t at, int64_t slots, float*) {
    for (int64_t n = 0; n < 4; ++n)
      kernels::add_by_code(weights.data(), lanes, d.wide.data() + at + n * slots * 64, 64, slots, 64, sums.data(),
                           256 * lanes);
  });
}

// Rows x 64 channels against a tile of 128 keys: what a reconstructing backend does per tile, decoding apart.
void multiply_tile(benchmark::State& state) {
  const int64_t rows = state.range(0);
  Matrix<float> q(rows, 64, 0.5f), k(64, 128, 0.25f), s(rows, 128);
  for (auto _ : state) {
    kernels::multiply(q.data(), 64, k.data(), 128, s.data(), 128, rows, 64, 128, false);
    benchmark::DoNotOptimize(s.data());
  }
  state.counters["flop/s"] =
      benchmark::Counter(static_cast<double>(2 * rows * 64 * 128), benchmark::Counter::kIsIterationInvariantRate);
}

void tables(benchmark::internal::Benchmark* b) {
  for (const int64_t slots : {16, 32, 56}) b->Args({slots, 256, 1});
  for (const int64_t entries : {16, 64, 128}) b->Args({32, entries, 1});
  b->ArgNames({"slots", "entries", "rows"});
}
void rows(benchmark::internal::Benchmark* b) {
  for (const int64_t rows : {1, 4, 8, 16})
    for (const int64_t slots : {8, 16, 32}) b->Args({slots, 256, rows});
  b->ArgNames({"slots", "entries", "rows"});
}
BENCHMARK(scan_fixed16)->Apply(tables);
BENCHMARK(scan_bytes8)->Apply(tables);
BENCHMARK(scan_gather)->Apply(tables);
BENCHMARK(scan_fp32_rows)->Apply(rows);
BENCHMARK(sums_by_code)->Apply(rows);
BENCHMARK(multiply_tile)->Arg(3)->Arg(24)->Arg(192);

}  // namespace

BENCHMARK_MAIN();
