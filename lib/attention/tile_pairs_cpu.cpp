// Keys that are sums of complex codewords before RoPE (CommVQ), in the code domain.
//
// RoPE multiplies a pair by a phase, and so commutes with the sum over stages: with the query q~ (rotated by its own
// position, and back by that of the chunk's first token), a logit is scale * sum over pairs of
//   Re(conj(q~_p) e^{i delta theta_p} S_p),  S_p = sum over stages of Z_a[p] + i Z_b[p]
// delta being the token's place in the chunk, so that phases are of 256 places whatever the context. Tables of
// conj(q~_p) Z[p], which commuting allows and the authors' kernel makes, would have each query head add up its own sums
// of stages: 4 adds a pair and stage for each. q~ is a factor of all of them; outside the sum, one S serves all query
// heads of the group, which add 2 multiplications a pair each, and the phase 4 for all of them.
#include <algorithm>

#include "attention/kernels_cpu.h"
#include "attention/tile_parts_cpu.h"

namespace vqkv {
namespace {

// Queries by blocks of 16 pairs, turned back by `phase`, (half) cos and (half) sin times `factor`; or as they are.
void lay_out(const float* x, int64_t d, int64_t rows, const float* phase, float factor, int64_t floats, float* out) {
  const int64_t half = d / 2;
  const float inverse = 1 / factor;
  std::fill_n(out, rows * floats, 0.0f);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t p = 0; p < half; ++p) {
      const float a = x[r * d + p], b = x[r * d + half + p];
      const float c = phase ? phase[p] * inverse : 1.0f, s = phase ? phase[half + p] * inverse : 0.0f;
      float* to = out + r * floats + p / PairBooks::kPairs * PairBooks::kFloats + p % PairBooks::kPairs;
      to[0] = a * c + b * s;
      to[PairBooks::kPairs] = b * c - a * s;
    }
}

}  // namespace

void scan_pair_chunk(const TiledCall& call, const Piece& piece, int64_t origin, int64_t low, int64_t high,
                     TileScratch& s) {
  const HeadQueries& q = call.heads[piece.head];
  const HeadColumns& columns = call.columns(piece.head);
  const TileDecoder& decoder = call.decoder(piece.head, Role::kKey);
  const RopeTable& rope = call.cache.rope();
  const int64_t half = call.d / 2, floats = decoder.pairs()->row_floats(), rows = piece.rows();
  constexpr int64_t kSpan = kChunkTiles * kTile;
  // Whole runs of a page are unpacked at once: from the run of the first token on, where slots are columns.
  const int64_t begin = columns.whole ? low / scan::kRun * scan::kRun : low, count = high - begin;
  constexpr int64_t kCodes = kSpan + scan::kRun;
  s.wide_codes.resize(decoder.code_slots().size() * static_cast<size_t>(kCodes));
  call.codes(piece.head, Role::kKey, begin, count, s.wide_codes.data(), kCodes);
  const int64_t skip = low - begin, tokens = high - low;
  float* sums = ensure_floats(s.pair_sums, kSpan * floats);
  decoder.pairs()->sum(s.wide_codes.data() + skip, kCodes, tokens, sums);

  const int64_t first = columns.sinks + low;  // column
  const float* phases;
  float* turned = ensure_floats(s.pair_queries, rows * floats);
  const float* x = q.x.data() + piece.row_begin * call.d;
  const float factor = static_cast<float>(rope.facts().attention_factor);
  if (columns.whole) {
    phases = rope.row(first - origin);  // rows of the first 1,024 positions lie side by side
    lay_out(x, call.d, rows, rope.row(origin), factor, floats, turned);
  } else {
    float* own = ensure_floats(s.pair_phases, kSpan * 2 * half + floats);
    for (int64_t t = 0; t < tokens; ++t)
      std::copy_n(rope.row(columns.position[static_cast<size_t>(first + t)]), 2 * half, own + t * 2 * half);
    phases = own;
    lay_out(x, call.d, rows, nullptr, 1.0f, floats, turned);
  }
  float* out = s.table_scores.data() + first - origin;
  kernels::score_pairs(sums, phases, 2 * half, half, turned, floats / PairBooks::kFloats, rows, tokens, out, kSpan);
  if (!q.token_scale) return;
  float* scale = ensure_floats(s.run_scale, kSpan);
  call.token_scale(piece.head, Role::kKey, low, tokens, scale);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t t = 0; t < tokens; ++t) out[r * kSpan + t] *= scale[t];
}

}  // namespace vqkv
