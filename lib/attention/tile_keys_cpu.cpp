#include <algorithm>
#include <cmath>

#include "attention/kernels_cpu.h"
#include "attention/level_tiles_cpu.h"
#include "attention/scan_cpu.h"
#include "attention/tile_parts_cpu.h"
#include "core/small_matrix.h"

namespace vqkv {

void scan_key_chunk(const TiledCall& call, const Piece& piece, int64_t tile_begin, int64_t tile_end, TileScratch& s) {
  const int head = piece.head;
  const int64_t origin = tile_begin * kTile, span = kChunkTiles * kTile;
  const HeadColumns& columns = call.columns(head);
  const int64_t low = std::max({origin, columns.sinks, columns.from.front()}) - columns.sinks;
  const int64_t high = std::min(columns.k_end.back(), tile_end * kTile) - columns.sinks;
  if (high <= low) return;
  ensure_floats(s.table_scores, piece.rows() * span);
  const HeadQueries& q = call.heads[head];
  const TileDecoder& decoder = call.decoder(head, Role::kKey);
  if (decoder.pairs()) return scan_pair_chunk(call, piece, origin, low, high, s);
  if (decoder.only_levels()) return score_level_chunk(call, piece, origin, low, high, s);
  const CodedBody body = call.body(head, Role::kKey);
  const PageLayout& pages = decoder.pages();
  // 8-bit codes of consecutive slots in pages of 64 tokens are one matrix already.
  const auto& slots = decoder.code_slots();
  bool direct = columns.whole && pages.tokens() == scan::kRun &&
                pages.layout().fields[static_cast<size_t>(slots[0].field)].bits == 8;
  for (size_t i = 0; i < slots.size(); ++i)
    direct = direct && slots[i].field == slots[0].field && slots[i].slot == slots[0].slot + static_cast<int>(i);
  const int64_t first_run = low / scan::kRun, runs = (high + scan::kRun - 1) / scan::kRun - first_run;
  const size_t matrix = slots.size() * scan::kRun;
  s.codes.resize(matrix * static_cast<size_t>(runs));
  s.wide_codes.resize(matrix * static_cast<size_t>(runs));
  ensure_floats(s.run_scores, runs * scan::kRun);
  ensure_floats(s.run_scale, runs * scan::kRun);
  const int64_t base = first_run * scan::kRun;
  // The token scale multiplies errors too: the loudest of the first tokens that a row sees coded, whatever other rows
  // of the block see.
  if (q.token_scale) {
    float* scale = s.run_scale.data() + low - base;
    call.token_scale(head, Role::kKey, low, high - low, scale);
    s.loudest.resize(static_cast<size_t>(high - low));
    float top = 0;
    for (int64_t t = 0; t < high - low; ++t)
      s.loudest[static_cast<size_t>(t)] = top = std::max(top, std::abs(scale[t]));
  }
  const auto loudest = [&](int64_t r) {
    if (!q.token_scale) return 1.0f;
    const auto query = static_cast<size_t>(r / call.group);
    const int64_t end = std::min({columns.k_end[query], columns.seen[query], high + columns.sinks}) - columns.sinks;
    const int64_t begin = std::max(low, columns.from[query] - columns.sinks);
    if (end <= begin) return 0.0f;
    if (begin == low) return s.loudest[static_cast<size_t>(end - low - 1)];
    float top = 0;  // the row sees less of this segment than others
    for (int64_t t = begin; t < end; ++t) top = std::max(top, std::abs(s.run_scale[static_cast<size_t>(t - base)]));
    return top;
  };
  const auto by_bytes = [&](int64_t r) {
    return !q.bytes.empty() && q.bytes[static_cast<size_t>(r)].bound * loudest(r) <= scan::kByteScanLimit;
  };
  const auto by_fixed = [&](int64_t r) {
    return !q.fixed.empty() && q.fixed[static_cast<size_t>(r)].bound * loudest(r) <= scan::kScanLimit;
  };
  bool need_wide = false;
  for (int64_t r = piece.row_begin; r < piece.row_end; ++r) need_wide = need_wide || !(by_bytes(r) || by_fixed(r));
  std::vector<const uint8_t*> codes(static_cast<size_t>(runs));
  for (int64_t n = 0; n < runs; ++n) {
    const int64_t first = (first_run + n) * scan::kRun, within = first % pages.tokens();
    uint16_t* wide = s.wide_codes.data() + static_cast<size_t>(n) * matrix;
    uint8_t* narrow = s.codes.data() + static_cast<size_t>(n) * matrix;
    codes[static_cast<size_t>(n)] = narrow;
    if (columns.whole) {
      const std::byte* bytes = body.page(first / pages.tokens());
      if (direct)
        codes[static_cast<size_t>(n)] =
            reinterpret_cast<const uint8_t*>(bytes + pages.field_offset(slots[0].field, slots[0].slot));
      if (direct && !need_wide) continue;
      for (size_t i = 0; i < slots.size(); ++i)
        pages.codes(bytes, slots[i].field, slots[i].slot, within, scan::kRun, wide + i * scan::kRun);
    } else {  // the codes of these columns alone; any code does for the others
      const int64_t from = std::max(low, first), to = std::min(high, first + scan::kRun);
      std::fill_n(wide, matrix, uint16_t{0});
      call.codes(head, Role::kKey, from, to - from, wide + (from - first), scan::kRun);
    }
    for (size_t i = 0; !direct && i < matrix; ++i) narrow[i] = static_cast<uint8_t>(wide[i]);
  }
  int64_t wide_group = -1;  // whose fp32 sums lie in s.wide_scores
  for (int64_t r = piece.row_begin; r < piece.row_end; ++r) {
    float* line = s.run_scores.data();
    if (by_bytes(r)) {
      scan::bytes(q.bytes[static_cast<size_t>(r)], codes.data(), runs, q.slots, line);
    } else if (by_fixed(r)) {
      scan::fixed(q.fixed[static_cast<size_t>(r)], codes.data(), runs, q.slots, line);
    } else {
      const int64_t group = r / q.lanes, each = q.slots * q.lut_stride, span_of_runs = runs * scan::kRun;
      float* lines = ensure_floats(s.wide_scores, q.lanes * span_of_runs);
      if (group != wide_group) {
        float* sums = ensure_floats(s.wide_sums, q.lanes * scan::kRun);
        for (int64_t n = 0; n < runs; ++n) {
          kernels::sum_by_code(q.beside.data() + group * q.lanes * each, q.lut_stride * q.lanes, q.lanes,
                               s.wide_codes.data() + static_cast<size_t>(n) * matrix, scan::kRun, q.slots, scan::kRun,
                               sums);
          kernels::transpose(sums, q.lanes, scan::kRun, q.lanes, lines + n * scan::kRun, span_of_runs, false);
        }
        wide_group = group;
      }
      std::copy_n(lines + r % q.lanes * span_of_runs, span_of_runs, line);
    }
    q.unfold_scores(r, s.run_scale.data(), low - base, high - base, line);
    std::copy(line + (low - base), line + (high - base),
              s.table_scores.data() + (r - piece.row_begin) * span + columns.sinks + low - origin);
  }
}

namespace {

void load_scale(const TiledCall& call, int head, const TileForms& k, int64_t begin, TileScratch& s) {
  if (!k.folded || !k.other) return;
  const TileDecoder& decoder = call.decoder(head, Role::kKey);
  if (!decoder.has_token_scale()) return;
  ensure_floats(s.scale, 2 * kTile);
  call.token_scale(head, Role::kKey, begin - call.columns(head).sinks + k.other_begin, k.other_end - k.other_begin,
                   s.scale.data() + k.other_begin);
}

}  // namespace

TileForms load_key_tile(const TiledCall& call, int head, KeyScan mode, int64_t begin, int64_t count, TileScratch& s) {
  TileForms f;
  const int64_t d = call.d;
  const RoleExtent e = call.extent(head, Role::kKey, begin, count);
  f.main = ensure_floats(s.keys, d * kTile);
  f.folded = e.any_coded() && call.decoder(head, Role::kKey).folded();
  f.table = e.any_coded() && mode != KeyScan::kNone;
  const int64_t shared_end =
      f.folded || f.table ? e.coded_begin : e.all_coded_end;  // coded columns of the main form end here
  if (e.coded_begin > e.begin)
    call.load_exact(head, Role::kKey, begin + e.begin, e.coded_begin - e.begin, f.main + e.begin, kTile);
  if (e.all_coded_end < count)
    call.load_exact(head, Role::kKey, begin + e.all_coded_end, count - e.all_coded_end, f.main + e.all_coded_end,
                    kTile);
  f.other_begin = shared_end;
  f.other_end = e.any_coded_end;
  if (e.any_coded() && !f.table) {
    const TileDecoder& decoder = call.decoder(head, Role::kKey);
    const int64_t origin = begin - call.columns(head).sinks;
    if (shared_end > e.coded_begin)
      call.decode(head, Role::kKey, origin + e.coded_begin, shared_end - e.coded_begin, f.main + e.coded_begin, kTile);
    if (f.other_end > f.other_begin) {
      f.other = ensure_floats(s.other_keys, decoder.width() * kTile);
      call.decode(head, Role::kKey, origin + f.other_begin, f.other_end - f.other_begin, f.other + f.other_begin,
                  kTile);
    }
  }
  if (!call.cache.keys_post_rope(call.layer, head)) {
    if (f.table) {  // what tables score is not in the tile
      call.rotate(head, f.main, begin, e.begin, e.coded_begin);
      call.rotate(head, f.main, begin, e.all_coded_end, count);
    } else {
      call.rotate(head, f.main, begin, 0, count);
    }
    if (f.other) call.rotate(head, f.other, begin, f.other_begin, f.other_end);
  }
  load_scale(call, head, f, begin, s);
  return f;
}

void score_tile(const TiledCall& call, int head, const TileForms& k, int64_t begin, int64_t count, int64_t row,
                int64_t batch, int64_t row_begin, TileScratch& s) {
  const HeadQueries& q = call.heads[head];
  const HeadColumns& of_head = call.columns(head);
  const int64_t columns = padded(count);
  float* scores = s.scores.data();
  const auto boundary = [&](int64_t r) { return of_head.k_end[static_cast<size_t>((row + r) / call.group)] - begin; };
  // Nothing exact in sight: all logits come from tables.
  const bool all_coded = k.table && k.other_begin == 0 && boundary(0) >= count;
  if (!all_coded)
    kernels::multiply(q.x.data() + row * call.d, call.d, k.main, kTile, scores, kTile, batch, call.d, columns, false);
  const int64_t other_end = std::min(count, k.other_end);
  if (k.table && other_end > k.other_begin) {
    const int64_t at = begin % (kChunkTiles * kTile);
    for (int64_t r = 0; r < batch; ++r) {
      const float* from = s.table_scores.data() + (row - row_begin + r) * kChunkTiles * kTile + at;
      const int64_t end = std::min(other_end, boundary(r));
      if (end > k.other_begin) std::copy(from + k.other_begin, from + end, scores + r * kTile + k.other_begin);
    }
  } else if (k.other && other_end > k.other_begin) {
    const int64_t low = k.other_begin / kernels::kLane * kernels::kLane, high = padded(other_end);
    float* others = ensure_floats(s.other_scores, kRowBatch * kTile);
    if (k.folded)
      kernels::multiply(q.y.data() + row * q.y_stride, q.y_stride, k.other + low, kTile, others + low, kTile, batch,
                        q.y_width, high - low, false);
    else
      kernels::multiply(q.x.data() + row * call.d, call.d, k.other + low, kTile, others + low, kTile, batch, call.d,
                        high - low, false);
    for (int64_t r = 0; r < batch; ++r) {
      const int64_t end = std::min(other_end, boundary(r));
      float* from = others + r * kTile;
      if (k.folded) q.unfold_scores(row + r, s.scale.data(), k.other_begin, end, from);
      if (end > k.other_begin) std::copy(from + k.other_begin, from + end, scores + r * kTile + k.other_begin);
    }
  }
  for (int64_t r = 0; r < batch; ++r) {
    float* line = scores + r * kTile;
    std::fill(line + call.seen(head, row + r, begin, count), line + columns, kNegativeInfinity);
    if (const int64_t from = of_head.from[static_cast<size_t>((row + r) / call.group)] - begin; from > 0)
      std::fill(line, line + std::min(from, columns), kNegativeInfinity);
    if (call.drops())
      if (const int64_t low = std::max<int64_t>(0, of_head.sinks - begin), high = std::min(count, boundary(r));
          high > low)
        std::fill(line + low, line + high, kNegativeInfinity);
  }
}

}  // namespace vqkv
