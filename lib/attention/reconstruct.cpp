// cpu-reconstruct: tiles of 128 tokens are brought to fp32 (from exact rows or codes), then attended by every query of
// the block and every query head of the group; no more than a tile per thread is ever dequantized.
//
// Tiles and chunks of tiles are cut at absolute token positions, whatever form the tokens have, and every sum runs in
// token order (kernels.h). So an identity codec gives the bits of the exact cache, a block of queries those of single
// steps, and the thread count changes nothing.
#include <algorithm>
#include <cmath>
#include <limits>

#include "attention/backends.h"
#include "attention/kernels.h"
#include "cache/impl.h"
#include "core/error.h"
#include "core/thread_pool.h"

namespace vqkv {
namespace {

constexpr int64_t kTile = 128;         // tokens; K^T and V tiles of 32 KiB at head_dim 64 stay in L2
constexpr int64_t kChunkTiles = 2;     // tiles a partial state: enough pieces for every thread at 1k tokens
constexpr int64_t kQueryBlock = 256;   // queries that share one decoding of a tile; bounds the partial states
constexpr int64_t kRowBatch = 24;      // rows scored at once: 12 KiB of scores stay in L1
constexpr float kNegativeInfinity = -std::numeric_limits<float>::infinity();

int64_t padded(int64_t n) { return (n + kernels::kLane - 1) / kernels::kLane * kernels::kLane; }

// Softmax states of all rows of one (chunk, kv head).
struct Partial {
  AlignedVector<float> top, sum, coded, out;  // (rows), (rows), (rows), (rows, width)
};

struct Scratch {
  AlignedVector<float> keys, values, scores;
};
Scratch& scratch() {
  thread_local Scratch s;
  return s;
}

void ensure(AlignedVector<float>& v, int64_t n) {
  if (static_cast<int64_t>(v.size()) < n) v.assign(static_cast<size_t>(n), 0.0f);
}

class ReconstructBackend final : public AttentionBackend {
 public:
  std::string name() const override { return "cpu-reconstruct"; }
  std::optional<std::string> can(const DecodePlan&, Role) const override { return std::nullopt; }

  void attend(const CompressedCache& cache, int layer, ConstMatrix q, MutMatrix out, AttendStats* stats, AttentionTap* tap) override {
    for (int64_t first = 0; first < q.rows; first += kQueryBlock) {
      const int64_t n = std::min(kQueryBlock, q.rows - first);
      attend_block(cache, layer, cache.length() + first, q.slice_rows(first, n), out.slice_rows(first, n), stats, tap);
    }
  }

 private:
  struct Call {
    const CompressedCache* cache;
    const CompressedCache::Impl* impl;
    int layer;
    int64_t first, queries, tokens;      // first position, number of queries, tokens seen by the last of them
    int64_t d, width, group, rows;       // width: d padded; rows = queries * group, row = query * group + head in group
    std::vector<int64_t> k_end, v_end;   // (queries): end of the coded body
    const AlignedVector<float>* q;       // (kv_heads): scaled queries, rows x d
  };

  void attend_block(const CompressedCache& cache, int layer, int64_t first, ConstMatrix q, MutMatrix out, AttendStats* stats,
                    AttentionTap* tap) {
    const CacheShape& shape = cache.shape();
    Call call;
    call.cache = &cache;
    call.impl = &cache.impl();
    call.layer = layer;
    call.first = first;
    call.queries = q.rows;
    call.tokens = first + q.rows;
    call.d = shape.head_dim;
    call.width = padded(shape.head_dim);
    call.group = shape.group();
    call.rows = call.queries * call.group;
    for (int64_t i = 0; i < q.rows; ++i) {
      call.k_end.push_back(cache.coded_end(Role::kKey, first + i));
      call.v_end.push_back(cache.coded_end(Role::kValue, first + i));
    }
    queries_.resize(static_cast<size_t>(shape.kv_heads));
    for (int h = 0; h < shape.kv_heads; ++h) {
      AlignedVector<float>& qh = queries_[static_cast<size_t>(h)];
      qh.resize(static_cast<size_t>(call.rows * call.d));
      for (int64_t i = 0; i < q.rows; ++i) {
        const float* from = q.row(i) + h * call.group * call.d;
        for (int64_t j = 0; j < call.group * call.d; ++j) qh[static_cast<size_t>(i * call.group * call.d + j)] = from[j] * shape.score_scale;
      }
    }
    call.q = queries_.data();
    const int64_t tiles = (call.tokens + kTile - 1) / kTile, chunks = (tiles + kChunkTiles - 1) / kChunkTiles;
    partials_.resize(static_cast<size_t>(chunks * shape.kv_heads));
    parallel_for(chunks * shape.kv_heads, [&](int64_t item) {
      const int64_t head = item % shape.kv_heads, chunk = item / shape.kv_heads;
      run_chunk(call, static_cast<int>(head), chunk * kChunkTiles, std::min(tiles, (chunk + 1) * kChunkTiles),
                partials_[static_cast<size_t>(item)]);
    });
    (void)tap;
    merge(call, chunks, out, stats);
  }

  static void run_chunk(const Call& call, int head, int64_t tile_begin, int64_t tile_end, Partial& p) {
    p.top.assign(static_cast<size_t>(call.rows), kNegativeInfinity);
    p.sum.assign(static_cast<size_t>(call.rows), 0.0f);
    p.coded.assign(static_cast<size_t>(call.rows), 0.0f);
    p.out.assign(static_cast<size_t>(call.rows * call.width), 0.0f);
    Scratch& s = scratch();
    ensure(s.keys, call.d * kTile);
    ensure(s.values, kTile * call.width);
    ensure(s.scores, kRowBatch * kTile);
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
      const int64_t begin = tile * kTile, count = std::min(kTile, call.tokens - begin), columns = padded(count);
      call.impl->load_keys(call.layer, head, begin, count, s.keys.data(), kTile);
      call.impl->load_values(call.layer, head, begin, count, s.values.data(), call.width);
      // Queries before the tile see nothing of it.
      for (int64_t row = std::max<int64_t>(0, begin - call.first) * call.group; row < call.rows; row += kRowBatch) {
        const int64_t batch = std::min(kRowBatch, call.rows - row);
        kernels::multiply(call.q[head].data() + row * call.d, call.d, s.keys.data(), kTile, s.scores.data(), kTile, batch,
                          call.d, columns, false);
        for (int64_t r = 0; r < batch; ++r) {
          const int64_t query = (row + r) / call.group;
          float* line = s.scores.data() + r * kTile;
          std::fill(line + std::min(count, call.first + query + 1 - begin), line + columns, kNegativeInfinity);
          update_row(call, p, row + r, line, columns);
        }
        kernels::multiply(s.scores.data(), kTile, s.values.data(), call.width, p.out.data() + row * call.width, call.width,
                          batch, count, call.width, true);
      }
    }
  }

  // Logits of a tile become probabilities relative to the row's running maximum.
  static void update_row(const Call& call, Partial& p, int64_t row, float* line, int64_t columns) {
    float& top = p.top[static_cast<size_t>(row)];
    const float higher = std::max(top, kernels::row_max(line, columns));
    if (higher == kNegativeInfinity) {
      std::fill(line, line + columns, 0.0f);
      return;
    }
    if (higher > top && top != kNegativeInfinity) {
      const float f = std::exp(top - higher);
      p.sum[static_cast<size_t>(row)] *= f;
      kernels::scale_row(p.out.data() + row * call.width, call.width, f);
    }
    top = higher;
    p.sum[static_cast<size_t>(row)] += kernels::exp_row(line, columns, higher);
  }

  void merge(const Call& call, int64_t chunks, MutMatrix out, AttendStats* stats) {
    const int64_t heads = call.impl->shape.kv_heads;
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t row = 0; row < call.rows; ++row) {
        const size_t r = static_cast<size_t>(row);
        float top = kNegativeInfinity;
        for (int64_t c = 0; c < chunks; ++c) top = std::max(top, partials_[static_cast<size_t>(c * heads + h)].top[r]);
        float* to = out.row(row / call.group) + (h * call.group + row % call.group) * call.d;
        std::fill(to, to + call.d, 0.0f);
        float sum = 0;
        for (int64_t c = 0; c < chunks; ++c) {
          const Partial& p = partials_[static_cast<size_t>(c * heads + h)];
          if (p.top[r] == kNegativeInfinity) continue;
          const float f = std::exp(p.top[r] - top);
          sum += f * p.sum[r];
          kernels::add_scaled(p.out.data() + row * call.width, call.d, f, to);
        }
        kernels::scale_row(to, call.d, 1.0f / sum);
        if (stats) stats->total_mass += 1.0;
      }
    }
  }

  std::vector<AlignedVector<float>> queries_;
  std::vector<Partial> partials_;
};

}  // namespace

std::unique_ptr<AttentionBackend> make_reconstruct_backend() { return std::make_unique<ReconstructBackend>(); }

}  // namespace vqkv
