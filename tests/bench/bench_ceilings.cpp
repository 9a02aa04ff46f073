// What this processor can do at most, measured beside the other benches: fp32 multiply-adds of one core in registers,
// and bytes read from memory. A ratio against another engine cannot pass what these leave room for.
//   bench_ceilings [--benchmark_filter=fma]
#include <benchmark/benchmark.h>

#include <array>
#include <vector>

#include "core/thread_pool.h"
#include "core/view.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "bench_ceilings.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace vqkv {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// 16 independent chains cover the latency of any current core. Returns the multiply-adds a round.
int64_t multiply_adds(int64_t rounds, float* out) {
  const hn::ScalableTag<float> d;
  constexpr int kChains = 16;
  hn::Vec<decltype(d)> sum[kChains];
  for (int i = 0; i < kChains; ++i) sum[i] = hn::Set(d, static_cast<float>(i));
  const auto a = hn::Set(d, out[0]), b = hn::Set(d, out[1]);
  for (int64_t r = 0; r < rounds; ++r)
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) sum[i] = hn::MulAdd(sum[i], a, b);
  for (int i = 1; i < kChains; ++i) sum[0] = hn::Add(sum[0], sum[i]);
  out[2] = hn::GetLane(sum[0]);
  return kChains * static_cast<int64_t>(hn::Lanes(d));
}

float read_all(const float* from, int64_t n) {
  const hn::ScalableTag<float> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  hn::Vec<decltype(d)> sum[8];
  for (int i = 0; i < 8; ++i) sum[i] = hn::Zero(d);
  for (int64_t at = 0; at + 8 * lanes <= n; at += 8 * lanes)
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) sum[i] = hn::Add(sum[i], hn::LoadU(d, from + at + i * lanes));
  for (int i = 1; i < 8; ++i) sum[0] = hn::Add(sum[0], sum[i]);
  return hn::GetLane(sum[0]);
}

}  // namespace HWY_NAMESPACE
}  // namespace vqkv
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace vqkv {
namespace {
HWY_EXPORT(multiply_adds);
HWY_EXPORT(read_all);

// Items are floating-point operations, two a multiply-add.
void fma(benchmark::State& state) {
  constexpr int64_t kRounds = 1 << 16;
  std::array<float, 3> values = {0.999f, 0.001f, 0.0f};
  int64_t a_round = 0;
  for (auto _ : state) {
    a_round = HWY_DYNAMIC_DISPATCH(multiply_adds)(kRounds, values.data());
    benchmark::DoNotOptimize(values.data());
  }
  state.SetItemsProcessed(state.iterations() * 2 * kRounds * a_round);
}
BENCHMARK(fma);

// 512 MiB, far beyond every cache, by as many threads as the argument says (0: all).
void read_memory(benchmark::State& state) {
  set_thread_count(state.range(0) == 0 ? thread_count() : static_cast<int>(state.range(0)));
  constexpr int64_t kPiece = int64_t{1} << 18, kPieces = 512;
  static const AlignedVector<float> data(static_cast<size_t>(kPiece * kPieces), 1.0f);
  for (auto _ : state)
    parallel_for(kPieces, [&](int64_t i) {
      benchmark::DoNotOptimize(HWY_DYNAMIC_DISPATCH(read_all)(data.data() + i * kPiece, kPiece));
    });
  state.SetBytesProcessed(state.iterations() * kPiece * kPieces * 4);
}
BENCHMARK(read_memory)->Arg(0)->Arg(1)->UseRealTime()->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace vqkv
#endif
