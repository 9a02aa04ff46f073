// The reference runtime on SmolLM2: prefill and decode in tokens a second, and the packed products alone.
//   bench_runtime [--benchmark_filter=prefill] [--benchmark_repetitions=5]
// VQKV_MODEL names another model. Threads: every processor this process may use (taskset narrows it).
// items_per_second of prefill and decode is tokens a second; of products it is floating-point operations a second, and
// bytes_per_second of a product with one row is the rate at which weights are read. all_threads_s is processor time,
// the CPU column that of the calling thread: on idle cores a prefill is no faster than either allows.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdlib>
#include <ctime>

#include "attention/session_cpu.h"
#include "core/gemm.h"
#include "core/rng.h"
#include "model/runtime.h"

namespace vqkv {
namespace {

template <DType weights>
ModelRuntime& model() {
  static const std::unique_ptr<ModelRuntime> m = [] {
    const char* path = std::getenv("VQKV_MODEL");
    return load_model(path ? path : VQKV_SOURCE_DIR "/data/models/SmolLM2-135M-Instruct.Q4_1.gguf",
                      {.weights = weights});
  }();
  return *m;
}

std::vector<int32_t> some_tokens(int64_t n, const ModelRuntime& model) {
  Rng rng(1);
  std::vector<int32_t> ids;
  while (static_cast<int64_t>(ids.size()) < n)
    ids.push_back(static_cast<int32_t>(rng.below(static_cast<uint64_t>(model.facts().vocab))));
  return ids;
}

struct Session {
  explicit Session(const ModelRuntime& model)
      : cache(exact_codec_set(model.facts().cache_shape()), CachePolicy::exact(DType::kF32)) {}
  CompressedCache cache;
  std::unique_ptr<AttentionBackend> backend = make_attention_backend("cpu-reconstruct");
  KvSessionCpu kv{cache, *backend};
};

template <DType weights>
void prefill_with(benchmark::State& state) {
  ModelRuntime& runtime = model<weights>();
  const auto ids = some_tokens(state.range(0), runtime);
  Matrix<float> logits(1, runtime.facts().vocab);
  double attend = 0;
  const std::clock_t before = std::clock();
  for (auto _ : state) {
    Session s(runtime);
    runtime.forward(ids, s.kv, LogitRows::kLast, logits);
    attend += s.kv.attend_seconds();
  }
  state.SetItemsProcessed(state.iterations() * state.range(0));
  state.SetLabel(runtime.weights());
  state.counters["attend_s"] = attend / static_cast<double>(state.iterations());
  state.counters["all_threads_s"] =
      static_cast<double>(std::clock() - before) / CLOCKS_PER_SEC / static_cast<double>(state.iterations());
}
void prefill(benchmark::State& state) { prefill_with<DType::kF32>(state); }
void prefill_bf16(benchmark::State& state) { prefill_with<DType::kBF16>(state); }
BENCHMARK(prefill)->Arg(512)->Arg(2048)->Unit(benchmark::kMillisecond)->UseRealTime();
BENCHMARK(prefill_bf16)->Arg(512)->Arg(2048)->Unit(benchmark::kMillisecond)->UseRealTime();

// A window with the logits of every position, 256 at a time, as the backward pass makes them.
void forward(benchmark::State& state) {
  ModelRuntime& runtime = model<DType::kF32>();
  const auto ids = some_tokens(state.range(0), runtime);
  constexpr int64_t kRows = 256;
  Matrix<float> logits(kRows, runtime.facts().vocab);
  for (auto _ : state) {
    Session s(runtime);
    for (int64_t at = 0; at < state.range(0); at += kRows) {
      const int64_t n = std::min(kRows, state.range(0) - at);
      runtime.forward(std::span(ids).subspan(static_cast<size_t>(at), static_cast<size_t>(n)), s.kv, LogitRows::kAll,
                      logits.view().slice_rows(0, n));
    }
  }
  state.SetItemsProcessed(state.iterations() * state.range(0));
}
BENCHMARK(forward)->Arg(512)->Arg(2048)->Unit(benchmark::kMillisecond)->UseRealTime();

struct NoTap final : GradientTap {
  void on_gradients(int, ConstMatrix key, ConstMatrix, ConstMatrix) override { benchmark::DoNotOptimize(key.data); }
};

// Forward and backward pass: the gradient of the NLL with respect to every key and value.
void backward(benchmark::State& state) {
  ModelRuntime& runtime = model<DType::kF32>();
  const auto ids = some_tokens(state.range(0), runtime);
  NoTap tap;
  for (auto _ : state) {
    NllLoss loss = NllLoss::next_tokens(ids);
    benchmark::DoNotOptimize(runtime.backward(ids, loss, tap));
  }
  state.SetItemsProcessed(state.iterations() * state.range(0));
}
BENCHMARK(backward)->Arg(512)->Arg(2048)->Unit(benchmark::kMillisecond)->UseRealTime();

template <DType weights>
void decode_with(benchmark::State& state) {
  ModelRuntime& runtime = model<weights>();
  const auto prompt = some_tokens(state.range(0), runtime);
  Matrix<float> logits(1, runtime.facts().vocab);
  Session s(runtime);
  runtime.forward(prompt, s.kv, LogitRows::kNone, {});
  const double before = s.kv.attend_seconds();
  for (auto _ : state) runtime.forward(std::span(prompt).first(1), s.kv, LogitRows::kLast, logits);
  state.SetItemsProcessed(state.iterations());
  state.SetLabel(runtime.weights());
  state.counters["attend_s"] = (s.kv.attend_seconds() - before) / static_cast<double>(state.iterations());
}
void decode(benchmark::State& state) { decode_with<DType::kF32>(state); }
void decode_bf16(benchmark::State& state) { decode_with<DType::kBF16>(state); }
BENCHMARK(decode)->Arg(512)->Arg(4096)->Unit(benchmark::kMillisecond)->UseRealTime()->Iterations(64);
BENCHMARK(decode_bf16)->Arg(512)->Arg(4096)->Unit(benchmark::kMillisecond)->UseRealTime()->Iterations(64);

void product(benchmark::State& state) {
  const int64_t m = state.range(0), k = state.range(1), n = state.range(2);
  Matrix<float> w(n, k), x(m, k), y(m, n);
  Rng rng(2);
  for (float& v : w.storage) v = static_cast<float>(rng.uniform());
  for (float& v : x.storage) v = static_cast<float>(rng.uniform());
  // Enough copies that one row streams from memory, as in a model.
  std::vector<PackedWeights> copies;
  for (int64_t bytes = 0; bytes == 0 || (m == 1 && bytes < (int64_t{128} << 20)); bytes += n * k * 4)
    copies.emplace_back(w.view(), DType::kF32);
  size_t next = 0;
  for (auto _ : state) {
    copies[next++ % copies.size()].apply(x, y);
    benchmark::ClobberMemory();
  }
  state.SetItemsProcessed(state.iterations() * 2 * m * n * k);
  state.SetBytesProcessed(state.iterations() * n * k * 4);
}
BENCHMARK(product)
    ->Args({512, 576, 960})
    ->Args({512, 576, 576})
    ->Args({512, 576, 3072})
    ->Args({512, 1536, 576})
    ->Args({512, 4864, 896})
    ->Args({16, 576, 3072})
    ->Args({1, 576, 3072})
    ->Args({1, 1536, 576})
    ->Args({1, 576, 49152})
    ->Unit(benchmark::kMicrosecond)
    ->UseRealTime();

}  // namespace
}  // namespace vqkv

BENCHMARK_MAIN();
