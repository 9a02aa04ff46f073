// What a cache costs before its first token, and what a sequence costs in memory, at the shape of SmolLM2-135M: 30
// layers of 3 KV heads of 64 channels.
//
// start/rebuilt makes the model side for every cache, start/shared takes one of the codec set: what a replay pays a
// window and candidate. `bytes` is what the allocator holds for one of them. sequences/N holds N sequences of 1,024
// tokens, the last 16 attended to over one backend; `growth` is the allocator's growth over the ledgers' resident
// bytes.
//
// decode_head reads the codes of one head of a unit of 8 heads, pq 16x256 a head, behind a rotation of each head or
// Hadamard signs: with the map as it is, and with the same map written out over the whole unit. Keys stand before RoPE,
// so the map is applied to tokens; values stay in the code domain.
#include <benchmark/benchmark.h>
#include <malloc.h>

#include "attention/plan_codec.h"
#include "attention/sequence.h"
#include "attention/session_cpu.h"
#include "cache/model.h"
#include "cache/view.h"

namespace {

using namespace vqkv;
using namespace vqkv::test;

int64_t process_bytes() {
  const struct mallinfo2 m = mallinfo2();
  return static_cast<int64_t>(m.uordblks + m.hblkhd);
}

enum class Kind { kProduct, kMapped, kLevels };

std::shared_ptr<const CodecSet> codes(Kind kind) {
  return make_set(make_shape(30, 3, 3, 64), 1, [&](Role, int channels) {
    DecodePlan p = empty_plan(channels);
    if (kind == Kind::kLevels)
      add_levels(p, 2, 32, 1, true);
    else
      add_table(p, 8, 4);
    if (kind == Kind::kMapped) {
      const Matrix<float> map = random_matrix(channels, channels, 9);
      p.map = DenseMap{channels, channels, {map.storage.begin(), map.storage.end()}};
    }
    return std::make_shared<PlanCodec>(p);
  });
}

void start(benchmark::State& state, Kind kind, bool shared) {
  const auto set = codes(kind);
  const auto model = std::make_shared<const CacheModel>(set);
  const auto backend = make_attention_backend("cpu-reconstruct");
  const auto make = [&] {
    return shared ? std::make_unique<CompressedCache>(model, CachePolicy())
                  : std::make_unique<CompressedCache>(set, CachePolicy());
  };
  for (auto _ : state) {
    const auto cache = make();
    const KvSessionCpu session(*cache, *backend);
    benchmark::DoNotOptimize(cache->length());
  }
  state.SetItemsProcessed(state.iterations());
  const int64_t before = process_bytes();
  const auto cache = make();
  const KvSessionCpu session(*cache, *backend);
  const double bytes = static_cast<double>(process_bytes() - before);
  state.counters["bytes"] = bytes;
  state.counters["caches/MB"] = 1e6 / bytes;
}

void sequences(benchmark::State& state) {
  const auto model = std::make_shared<const CacheModel>(codes(Kind::kProduct));
  const std::shared_ptr<AttentionBackend> backend = make_attention_backend("auto");
  constexpr int64_t kTokens = 1024, kAttended = 16;
  const Tokens x(model->shape(), kTokens, 3);
  Matrix<float> out(kAttended, x.q.cols);
  const auto make = [&] {
    auto sequence = std::make_unique<Sequence>(model, CachePolicy(), backend);
    const auto rows = [](const Matrix<float>& all, int64_t first, int64_t n) {
      return all.view().slice_rows(first, n);
    };
    const int64_t n = kTokens - kAttended;
    sequence->cache().begin_block(n);
    for (int layer = 0; layer < model->shape().layers; ++layer)
      sequence->cache().append(layer, rows(x.k, 0, n), rows(x.v, 0, n));
    sequence->cache().end_block();
    sequence->session().begin_block(kAttended);
    for (int layer = 0; layer < model->shape().layers; ++layer)
      sequence->session().attend(layer, rows(x.q, n, kAttended), rows(x.k, n, kAttended), rows(x.v, n, kAttended), out);
    sequence->session().end_block();
    return sequence;
  };
  const auto first = make();  // buffers of threads and backend, rotation table
  for (auto _ : state) {
    const int64_t before = process_bytes();
    int64_t ledger = 0;
    std::vector<std::unique_ptr<Sequence>> held;
    for (int64_t i = 0; i < state.range(0); ++i) {
      held.push_back(make());
      ledger += held.back()->bytes().total_sequence();
    }
    state.counters["growth"] = static_cast<double>(process_bytes() - before) / static_cast<double>(ledger);
    state.counters["resident"] = static_cast<double>(ledger) / static_cast<double>(state.range(0));
    state.counters["books"] = static_cast<double>(first->bytes().codebooks);
    state.counters["backend"] = static_cast<double>(backend->held_bytes());
  }
}

LinearMap map_by_head(bool hadamard, int heads, int d) {
  const std::vector<float> signs = random_bias(heads * d, 12);
  if (hadamard) return HadamardMap{heads * d, d, {}, signs};
  BlockMap map;
  for (int h = 0; h < heads; ++h) {
    const Matrix<float> m = random_matrix(d, d, 9 + static_cast<uint64_t>(h));
    map.blocks.push_back({d, d, {m.storage.begin(), m.storage.end()}});
  }
  return map;
}

void decode_head(benchmark::State& state, Role role, bool hadamard, bool written_out) {
  constexpr int kHeads = 8, kDim = 64;
  constexpr int64_t kTokens = 4096;
  const auto set = make_set(make_shape(1, 1, kHeads, kDim), kHeads, [&](Role r, int channels) {
    DecodePlan p = empty_plan(channels);
    add_table(p, 8, 4);
    p.map = map_by_head(hadamard, kHeads, kDim);
    if (written_out) {
      const std::vector<double> all = dense_of(p.map, channels, channels);
      p.map = DenseMap{channels, channels, {all.begin(), all.end()}};
    }
    if (r == Role::kKey) p.rope = RopePlacement::kPre;
    return std::make_shared<PlanCodec>(p);
  });
  CompressedCache cache(set, CachePolicy());
  const Tokens x(set->shape(), kTokens + 1024, 3);
  cache.begin_block(x.k.rows);
  cache.append(0, x.k, x.v);
  cache.end_block();
  const CacheView view(cache);
  const TileDecoder& decoder = view.decoder(0, 3, role);
  const CodedBody body = view.body(0, 3, role);
  AlignedVector<float> out(static_cast<size_t>(128 * kHeads * kDim));
  for (auto _ : state)
    for (int64_t t = 0; t < kTokens; t += 128) {
      if (role == Role::kKey)
        decoder.keys(body, t, 128, out.data(), 128);
      else
        decoder.values(body, t, 128, out.data(), decoder.width());
      benchmark::DoNotOptimize(out.data());
    }
  state.SetItemsProcessed(state.iterations() * kTokens);
}

BENCHMARK_CAPTURE(decode_head, keys_rotation, Role::kKey, false, false);
BENCHMARK_CAPTURE(decode_head, keys_rotation_dense, Role::kKey, false, true);
BENCHMARK_CAPTURE(decode_head, keys_hadamard, Role::kKey, true, false);
BENCHMARK_CAPTURE(decode_head, keys_hadamard_dense, Role::kKey, true, true);
BENCHMARK_CAPTURE(decode_head, values_rotation, Role::kValue, false, false);
BENCHMARK_CAPTURE(decode_head, values_rotation_dense, Role::kValue, false, true);
BENCHMARK_CAPTURE(start, rebuilt_pq, Kind::kProduct, false);
BENCHMARK_CAPTURE(start, shared_pq, Kind::kProduct, true);
BENCHMARK_CAPTURE(start, rebuilt_mapped, Kind::kMapped, false);
BENCHMARK_CAPTURE(start, shared_mapped, Kind::kMapped, true);
BENCHMARK_CAPTURE(start, rebuilt_levels, Kind::kLevels, false);
BENCHMARK_CAPTURE(start, shared_levels, Kind::kLevels, true);
BENCHMARK(sequences)->Arg(1)->Arg(8)->Arg(64)->Iterations(1)->Unit(benchmark::kMillisecond);

}  // namespace
