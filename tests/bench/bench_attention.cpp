// One decoding step's attention over a long context, one thread: an exact cache against product codes scored by table
// scans and by reconstruction, values reconstructed in all. Google Benchmark gives time per step; use
// --benchmark_repetitions and read the medians.
#include <benchmark/benchmark.h>

#include "attention/plan_codec.h"
#include "attention/scan.h"
#include "core/thread_pool.h"

namespace {

using namespace vqkv;
using namespace vqkv::test;

// 16 slots of 256 codewords a head, as PQ 16x256.
std::shared_ptr<const CodecSet> codes_of(const CacheShape& shape) {
  return make_set(shape, 1, [&](Role, int channels) {
    DecodePlan p = empty_plan(channels);
    add_table(p, 8, channels / 16);
    return std::make_shared<PlanCodec>(p);
  });
}

void step(benchmark::State& state, const char* backend_name, bool coded, DType exact) {
  const int64_t context = state.range(0);
  const CacheShape shape = make_shape(1, static_cast<int>(state.range(1)), 1, static_cast<int>(state.range(2)));
  set_thread_count(1);
  const auto backend = make_attention_backend(backend_name);
  CachePolicy policy;
  policy.codes = coded;
  policy.exact_dtype = exact;
  CompressedCache cache(codes_of(shape), policy);
  const Tokens x(shape, 4096, 5);
  for (int64_t t = 0; t < context; t += 4096) {
    cache.begin_block(4096);
    cache.append(0, x.k, x.v);
    cache.end_block();
  }
  cache.begin_block(1);
  cache.append(0, x.k.view().slice_rows(0, 1), x.v.view().slice_rows(0, 1));
  Matrix<float> out(1, x.q.cols);
  for (auto _ : state) {
    backend->attend(cache, 0, x.q.view().slice_rows(1, 1), out);
    benchmark::DoNotOptimize(out.data());
  }
  state.counters["time/token"] = benchmark::Counter(
      static_cast<double>(context), benchmark::Counter::kIsIterationInvariantRate | benchmark::Counter::kInvert);
}

void shapes(benchmark::internal::Benchmark* b) {
  for (const int64_t context : {4096, 32768})
    for (const int64_t group : {3, 4})
      for (const int64_t d : {64, 128}) b->Args({context, group, d});
  b->ArgNames({"context", "group", "d"})->Unit(benchmark::kMicrosecond);
}

BENCHMARK_CAPTURE(step, exact_f16, "cpu-reconstruct", false, DType::kF16)->Apply(shapes);
BENCHMARK_CAPTURE(step, exact_bf16, "cpu-reconstruct", false, DType::kBF16)->Apply(shapes);
BENCHMARK_CAPTURE(step, pq_reconstruct, "cpu-reconstruct", true, DType::kF16)->Apply(shapes);
BENCHMARK_CAPTURE(step, pq_table, "cpu-table", true, DType::kF16)->Apply(shapes);
BENCHMARK_CAPTURE(step, pq_table8, "cpu-table8", true, DType::kF16)->Apply(shapes);

}  // namespace

BENCHMARK_MAIN();
