// Scoring of coded keys, one thread: table scans of 16-slot, 256-entry product codes against reconstruction, and the
// multiply kernel that all attention runs on. Lookups are (row, token, slot).
#include <benchmark/benchmark.h>

#include "attention/scan.h"
#include "cache/kernels.h"
#include "core/rng.h"
#include "core/thread_pool.h"

namespace {

using namespace vqkv;

constexpr int64_t kRuns = 1024;  // of 64 tokens: 1 MiB of codes at 16 slots, beyond L1

struct Data {
  Matrix<float> lut;
  scan::FixedTables tables;
  scan::ByteTables bytes;
  std::vector<uint8_t> codes;
  std::vector<uint16_t> wide;
  explicit Data(int64_t slots) : lut(slots, 256) {
    Rng rng(1);
    for (float& v : lut.storage) v = static_cast<float>(0.01 * rng.normal());
    scan::quantize(lut.data(), slots, 256, 256, tables);
    scan::quantize(lut.data(), slots, 256, 256, bytes);
    codes.resize(static_cast<size_t>(kRuns * slots * 64));
    wide.resize(codes.size());
    for (size_t i = 0; i < codes.size(); ++i) wide[i] = codes[i] = static_cast<uint8_t>(rng.below(256));
  }
};

// Four runs a call, as a chunk of a cache gives them.
template <class Body>
void run(benchmark::State& state, Body&& body) {
  const int64_t slots = state.range(0);
  const Data data(slots);
  alignas(64) float out[4 * 64];
  for (auto _ : state) {
    for (int64_t r = 0; r < kRuns; r += 4) {
      const uint8_t* runs[4];
      for (int64_t n = 0; n < 4; ++n) runs[n] = data.codes.data() + (r + n) * slots * 64;
      body(data, runs, r * slots * 64, slots, out);
      benchmark::DoNotOptimize(out);
    }
  }
  state.counters["lookups/s"] =
      benchmark::Counter(static_cast<double>(kRuns * slots * 64), benchmark::Counter::kIsIterationInvariantRate);
}

void scan_fixed16(benchmark::State& state) {
  if (!scan::fixed_available()) return state.SkipWithError("needs AVX-512 VBMI");
  run(state, [](const Data& d, const uint8_t* const* runs, int64_t, int64_t slots, float* out) {
    scan::fixed(d.tables, runs, 4, slots, out);
  });
}

void scan_bytes8(benchmark::State& state) {
  if (!scan::fixed_available()) return state.SkipWithError("needs AVX-512 VBMI");
  run(state, [](const Data& d, const uint8_t* const* runs, int64_t, int64_t slots, float* out) {
    scan::bytes(d.bytes, runs, 4, slots, out);
  });
}

void scan_fp32(benchmark::State& state) {
  run(state, [](const Data& d, const uint8_t* const*, int64_t at, int64_t slots, float* out) {
    for (int64_t n = 0; n < 4; ++n)
      scan::plain(d.lut.data(), 256, d.wide.data() + at + n * slots * 64, slots, out + 64 * n);
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

BENCHMARK(scan_fixed16)->Arg(16)->Arg(32)->Arg(56);
BENCHMARK(scan_bytes8)->Arg(16)->Arg(32)->Arg(56);
BENCHMARK(scan_fp32)->Arg(16)->Arg(32);
BENCHMARK(multiply_tile)->Arg(3)->Arg(24)->Arg(192);

}  // namespace

BENCHMARK_MAIN();
