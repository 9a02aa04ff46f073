// cpu-reconstruct, cpu-table and cpu-table8.
//
// cpu-reconstruct: tiles of 128 tokens are brought to fp32 (from exact rows or codes), then attended by every query of
// the block and every query head of the group; no more than a tile per thread is ever dequantized.
//
// Tiles and chunks of tiles are cut at absolute token positions, whatever form the tokens have, and every sum runs in
// token order (cache/kernels.h). So an identity codec gives the bits of the exact cache, a block of queries those of
// single steps, and the thread count changes nothing.
//
// cpu-table: the same tiles and sums, but logits of coded keys are sums of table entries (scan.h) and no key is
// decoded. Values are summed by code (code_sums.h) in the segments where that is cheaper, and decoded elsewhere; what
// summed any by code calls itself cpu-table-sums.
//
// cpu-table8: cpu-table with 8-bit tables for the rows whose error bound stays below scan::kByteScanLimit; the others
// are scanned as cpu-table scans them. Never chosen by auto.
#include <algorithm>
#include <cmath>

#include <set>

#include "attention/backends.h"
#include "attention/code_sums.h"
#include "attention/scan.h"
#include "attention/tiled.h"
#include "cache/kernels.h"
#include "core/error.h"
#include "core/thread_pool.h"

namespace vqkv {
namespace {

constexpr int64_t kChunkTiles = 2;    // tiles a partial state: pieces for every thread already at 1k tokens
constexpr int64_t kQueryBlock = 256;  // queries that share one decoding of a tile; bounds the partial states
constexpr int64_t kTableFloats = int64_t{1} << 23;  // 32 MiB of tables a call
constexpr int64_t kRowBatch = 24;                   // rows scored at once: 12 KiB of scores stay in L1

struct Scratch {
  AlignedVector<float> keys, other_keys, values, other_values, scores, other_scores, scale, table_scores, run_scores,
      run_scale, weights, wide_sums, wide_scores;
  std::vector<uint8_t> codes;
  std::vector<uint16_t> wide_codes, value_codes;
  std::vector<float> loudest;
  CodeSums sums;
};
Scratch& scratch() {
  thread_local Scratch s;
  return s;
}

float* ensure(AlignedVector<float>& v, int64_t n) {
  if (static_cast<int64_t>(v.size()) < n) v.assign(static_cast<size_t>(n), 0.0f);
  return v.data();
}

// Both forms of the tokens of one tile for one role: the main form holds what all queries see alike, the other form the
// codes of tokens that only the later queries see coded, or all codes when they are decoded in their own domain.
struct TileForms {
  float* main = nullptr;
  float* other = nullptr;
  int64_t other_begin = 0, other_end = 0;  // columns (tokens within the tile) that `other` holds
  bool folded = false;
  bool table = false;  // logits of coded keys lie in Scratch::table_scores
};

class TiledEngine {
 public:
  static std::string path(KeyScan scan, bool sums) {
    const char* keys = scan == KeyScan::kNone    ? "cpu-reconstruct"
                       : scan == KeyScan::kFixed ? "cpu-table"
                                                 : "cpu-table8";
    return std::string(keys) + (sums ? "-sums" : "");
  }
  // Returns the path that ran.
  std::string attend(KeyScan scan, ValueSums sums, const CacheView& cache, int layer, ConstMatrix q, MutMatrix out,
                     AttendStats* stats, AttentionTap* tap) {
    scan_ = scan;
    tables_ = scan != KeyScan::kNone;
    when_ = sums;
    summed_ = false;
    int64_t step = tap ? q.rows : kQueryBlock;  // a tap is called once a block
    if (tables_ && cache.policy().keeps_codes()) {
      int64_t entries = 1;  // table entries of one query, all heads
      for (const size_t u : cache.layer_units(layer)) {
        if (cache.unit_shape(u).role != Role::kKey) continue;
        if (const auto reason = table_scan_reason(cache.form(u).plan))
          fail_unavailable(path(scan, false) + " cannot run layer " + std::to_string(layer) + ": " + *reason);
        for (const TileDecoder& d : cache.form(u).decoders)
          for (const TileDecoder::Slot& s : d.slots()) entries += cache.shape().group() * s.entries;
      }
      if (!tap) step = std::clamp<int64_t>(kTableFloats / entries, 1, kQueryBlock);
    }
    for (int64_t first = 0; first < q.rows; first += step) {
      const int64_t n = std::min(step, q.rows - first);
      attend_block(cache, layer, cache.length() + first, q.slice_rows(first, n), out.slice_rows(first, n), stats, tap);
    }
    return path(scan, summed_);
  }

 private:
  void attend_block(const CacheView& cache, int layer, int64_t first, ConstMatrix q, MutMatrix out, AttendStats* stats,
                    AttentionTap* tap) {
    TiledCall call(cache, layer, first, q.rows, rotation_);
    const int64_t heads = cache.shape().kv_heads;
    const int64_t tiles = (call.tokens + kTile - 1) / kTile, chunks = (tiles + kChunkTiles - 1) / kChunkTiles;
    queries_.resize(static_cast<size_t>(heads));
    call.heads = queries_.data();
    parallel_for(heads, [&](int64_t h) {
      queries_[static_cast<size_t>(h)].prepare(call, static_cast<int>(h), q,
                                               call.cache.policy().keeps_codes() ? scan_ : KeyScan::kNone);
    });
    if (tap) logits_.assign(static_cast<size_t>(heads * call.rows * call.tokens), kNegativeInfinity);
    // A score map needs the extremes of the whole coded segment before any probability.
    bool mapped = false;
    for (int h = 0; h < heads; ++h) mapped = mapped || call.score_map(h).kind != ScoreMap::Kind::kNone;
    if (mapped) {
      ranges_.resize(static_cast<size_t>(chunks * heads));
      parallel_for(chunks * heads, [&](int64_t item) {
        const int64_t chunk = item / heads;
        find_range(call, static_cast<int>(item % heads), chunk * kChunkTiles,
                   std::min(tiles, (chunk + 1) * kChunkTiles), ranges_[static_cast<size_t>(item)]);
      });
      for (int h = 0; h < heads; ++h)
        queries_[static_cast<size_t>(h)].set_score_map(call, call.score_map(h), ranges_, chunks, heads, h);
    }
    const std::vector<Piece> pieces = cut(call, tiles);
    if (partials_.size() < pieces.size()) partials_.resize(pieces.size());
    parallel_for(static_cast<int64_t>(pieces.size()), [&](int64_t i) {
      run_piece(call, pieces[static_cast<size_t>(i)], partials_[static_cast<size_t>(i)], tap != nullptr);
    });
    merge_partials(call, partials_, pieces.size(), out, stats);
    if (tap) report(call, layer, *tap);
  }

  // Segments whose later rows sum by code, then chunks for all other rows: the long pieces first, to end together.
  std::vector<Piece> cut(const TiledCall& call, int64_t tiles) {
    std::vector<Piece> pieces, chunks;
    for (int head = 0; head < call.cache.shape().kv_heads; ++head) {
      ValueRule rule;
      int64_t rows_at_once = call.rows;
      if (const int unit = call.coded_unit(head, Role::kValue); unit >= 0 && call.cache.policy().codes) {
        const TileDecoder& decoder = call.cache.decoder(call.layer, head, Role::kValue);
        rule = value_rule(call.cache.form(static_cast<size_t>(unit)).plan, decoder, call.group, when_);
        if (rule.segment > 0) rows_at_once = summed_rows(decoder);
      }
      const int64_t span = rule.segment > 0 ? rule.segment / kTile : tiles;
      for (int64_t begin = 0; begin < tiles; begin += span) {
        const int64_t end = std::min(tiles, begin + span);
        int64_t split = call.rows;  // the first row that sums by code
        while (rule.segment > 0 && split > 0 && call.coded_values(split - 1, begin * kTile, end * kTile) >= rule.least)
          split -= call.group;
        for (int64_t row = split; row < call.rows; row += rows_at_once)
          pieces.push_back({head, begin, end, row, std::min(call.rows, row + rows_at_once), true});
        if (split > 0)
          for (int64_t tile = begin; tile < end; tile += kChunkTiles)
            chunks.push_back({head, tile, std::min(end, tile + kChunkTiles), 0, split, false});
      }
    }
    summed_ = summed_ || !pieces.empty();
    pieces.insert(pieces.end(), chunks.begin(), chunks.end());
    return pieces;
  }

  // Logits of the coded tokens of tiles [tile_begin, tile_end), by rows of chunk length, into s.table_scores.
  static void scan_chunk(const TiledCall& call, const Piece& piece, int64_t tile_begin, int64_t tile_end, Scratch& s) {
    const int head = piece.head;
    const int64_t origin = tile_begin * kTile, span = kChunkTiles * kTile;
    const int64_t low = std::max(origin, call.sinks) - call.sinks;
    const int64_t high = std::min(call.k_end.back(), tile_end * kTile) - call.sinks;
    if (high <= low) return;
    ensure(s.table_scores, piece.rows() * span);
    const HeadQueries& q = call.heads[head];
    const TileDecoder& decoder = call.cache.decoder(call.layer, head, Role::kKey);
    const CodedBody body = call.cache.body(call.layer, head, Role::kKey);
    const PageLayout& pages = decoder.pages();
    // 8-bit codes of consecutive slots in pages of 64 tokens are one matrix already.
    const auto& slots = decoder.slots();
    bool direct = pages.tokens() == scan::kRun && pages.layout().fields[static_cast<size_t>(slots[0].field)].bits == 8;
    for (size_t i = 0; i < slots.size(); ++i)
      direct = direct && slots[i].field == slots[0].field && slots[i].slot == slots[0].slot + static_cast<int>(i);
    const int64_t first_run = low / scan::kRun, runs = (high + scan::kRun - 1) / scan::kRun - first_run;
    const size_t matrix = slots.size() * scan::kRun;
    s.codes.resize(matrix * static_cast<size_t>(runs));
    s.wide_codes.resize(matrix * static_cast<size_t>(runs));
    ensure(s.run_scores, runs * scan::kRun);
    ensure(s.run_scale, runs * scan::kRun);
    const int64_t base = first_run * scan::kRun;
    // The token scale multiplies errors too: the loudest of the first tokens that a row sees coded, whatever other rows
    // of the block see.
    if (q.token_scale) {
      float* scale = s.run_scale.data() + low - base;
      decoder.token_scale(body, low, high - low, scale);
      s.loudest.resize(static_cast<size_t>(high - low));
      float top = 0;
      for (int64_t t = 0; t < high - low; ++t)
        s.loudest[static_cast<size_t>(t)] = top = std::max(top, std::abs(scale[t]));
    }
    const auto loudest = [&](int64_t r) {
      if (!q.token_scale) return 1.0f;
      const int64_t query = r / call.group;
      const int64_t end = std::min(call.k_end[static_cast<size_t>(query)], call.first + query + 1) - call.sinks;
      return end > low ? s.loudest[static_cast<size_t>(std::min(end, high) - low - 1)] : 0.0f;
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
      const std::byte* bytes = body.page(first / pages.tokens());
      uint16_t* wide = s.wide_codes.data() + static_cast<size_t>(n) * matrix;
      uint8_t* narrow = s.codes.data() + static_cast<size_t>(n) * matrix;
      codes[static_cast<size_t>(n)] = narrow;
      if (bytes == nullptr) {  // lost to eviction: any code does, the tokens are masked later
        std::fill_n(wide, matrix, uint16_t{0});
        std::fill_n(narrow, matrix, uint8_t{0});
        continue;
      }
      if (direct)
        codes[static_cast<size_t>(n)] =
            reinterpret_cast<const uint8_t*>(bytes + pages.field_offset(slots[0].field, slots[0].slot));
      if (direct && !need_wide) continue;
      for (size_t i = 0; i < slots.size(); ++i)
        pages.codes(bytes, slots[i].field, slots[i].slot, within, scan::kRun, wide + i * scan::kRun);
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
        float* lines = ensure(s.wide_scores, q.lanes * span_of_runs);
        if (group != wide_group) {
          float* sums = ensure(s.wide_sums, q.lanes * scan::kRun);
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
                s.table_scores.data() + (r - piece.row_begin) * span + call.sinks + low - origin);
    }
  }

  // The K tile of one head, transposed (channels x kTile).
  TileForms load_keys(const TiledCall& call, int head, int64_t begin, int64_t count, Scratch& s) const {
    TileForms f;
    const int64_t d = call.d;
    const RoleExtent e = call.extent(Role::kKey, begin, count);
    f.main = ensure(s.keys, d * kTile);
    f.folded = e.any_coded() && call.cache.decoder(call.layer, head, Role::kKey).folded();
    f.table = e.any_coded() && tables_;
    const int64_t shared_end =
        f.folded || f.table ? e.coded_begin : e.all_coded_end;  // coded columns of the main form end here
    if (e.coded_begin > 0) call.cache.load_keys(call.layer, head, begin, e.coded_begin, f.main, kTile);
    if (e.all_coded_end < count)
      call.cache.load_keys(call.layer, head, begin + e.all_coded_end, count - e.all_coded_end, f.main + e.all_coded_end,
                           kTile);
    f.other_begin = shared_end;
    f.other_end = e.any_coded_end;
    if (e.any_coded() && !f.table) {
      const TileDecoder& decoder = call.cache.decoder(call.layer, head, Role::kKey);
      const CodedBody body = call.cache.body(call.layer, head, Role::kKey);
      const int64_t origin = begin - call.sinks;
      if (shared_end > e.coded_begin)
        decoder.keys(body, origin + e.coded_begin, shared_end - e.coded_begin, f.main + e.coded_begin, kTile);
      if (f.other_end > f.other_begin) {
        f.other = ensure(s.other_keys, decoder.width() * kTile);
        decoder.keys(body, origin + f.other_begin, f.other_end - f.other_begin, f.other + f.other_begin, kTile);
      }
    }
    if (!call.cache.keys_post_rope(call.layer, head)) {
      call.rotate(f.main, begin, 0, count);
      if (f.other) call.rotate(f.other, begin, f.other_begin, f.other_end);
    }
    return f;
  }

  static TileForms load_values(const TiledCall& call, int head, bool by_code, int64_t begin, int64_t count,
                               Scratch& s) {
    TileForms f;
    const RoleExtent e = call.extent(Role::kValue, begin, count);
    f.main = ensure(s.values, kTile * call.width);
    f.folded = e.any_coded() && call.cache.decoder(call.layer, head, Role::kValue).folded();
    f.table = e.any_coded() && by_code;
    const int64_t shared_end = f.folded || f.table ? e.coded_begin : e.all_coded_end;
    if (e.coded_begin > 0) call.cache.load_values(call.layer, head, begin, e.coded_begin, f.main, call.width);
    if (e.all_coded_end < count)
      call.cache.load_values(call.layer, head, begin + e.all_coded_end, count - e.all_coded_end,
                             f.main + e.all_coded_end * call.width, call.width);
    f.other_begin = shared_end;
    f.other_end = e.any_coded_end;
    if (e.dropped)  // weights of zero still multiply them
      std::fill(f.main + e.coded_begin * call.width, f.main + e.all_coded_end * call.width, 0.0f);
    if (!e.any_coded()) return f;
    const TileDecoder& decoder = call.cache.decoder(call.layer, head, Role::kValue);
    const CodedBody body = call.cache.body(call.layer, head, Role::kValue);
    const int64_t origin = begin - call.sinks;
    if (shared_end > e.coded_begin)
      decoder.values(body, origin + e.coded_begin, shared_end - e.coded_begin, f.main + e.coded_begin * call.width,
                     call.width);
    if (f.table) {
      s.value_codes.resize(decoder.slots().size() * kTile);
      decoder.codes(body, origin + f.other_begin, f.other_end - f.other_begin, s.value_codes.data() + f.other_begin,
                    kTile);
    } else if (f.other_end > f.other_begin) {
      const int64_t wide = padded(decoder.width());
      f.other = ensure(s.other_values, kTile * wide);
      decoder.values(body, origin + f.other_begin, f.other_end - f.other_begin, f.other + f.other_begin * wide, wide);
    }
    if ((f.folded || f.table) && f.other_end > f.other_begin && decoder.has_token_scale()) {
      ensure(s.scale, 2 * kTile);
      decoder.token_scale(body, origin + f.other_begin, f.other_end - f.other_begin,
                          s.scale.data() + kTile + f.other_begin);
    }
    return f;
  }

  // Logits of `batch` rows against a tile, each token in the form that the row's query sees; -inf where it sees
  // nothing. s.table_scores begins with row `row_begin`.
  static void score(const TiledCall& call, int head, const TileForms& k, int64_t begin, int64_t count, int64_t row,
                    int64_t batch, int64_t row_begin, Scratch& s) {
    const HeadQueries& q = call.heads[head];
    const int64_t columns = padded(count);
    float* scores = s.scores.data();
    const auto boundary = [&](int64_t r) { return call.k_end[static_cast<size_t>((row + r) / call.group)] - begin; };
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
      float* others = ensure(s.other_scores, kRowBatch * kTile);
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
      const int64_t query = (row + r) / call.group;
      float* line = scores + r * kTile;
      std::fill(line + std::min(count, call.first + query + 1 - begin), line + columns, kNegativeInfinity);
      if (call.drops())
        if (const int64_t low = std::max<int64_t>(0, call.sinks - begin), high = std::min(count, boundary(r));
            high > low)
          std::fill(line + low, line + high, kNegativeInfinity);
      call.mask_evicted(head, begin, count, line);
    }
  }

  static void load_key_scale(const TiledCall& call, int head, const TileForms& k, int64_t begin, Scratch& s) {
    if (!k.folded || !k.other) return;
    const TileDecoder& decoder = call.cache.decoder(call.layer, head, Role::kKey);
    if (!decoder.has_token_scale()) return;
    ensure(s.scale, 2 * kTile);
    decoder.token_scale(call.cache.body(call.layer, head, Role::kKey), begin - call.sinks + k.other_begin,
                        k.other_end - k.other_begin, s.scale.data() + k.other_begin);
  }

  void run_piece(const TiledCall& call, const Piece& piece, Partial& p, bool keep_logits) {
    const int head = piece.head;
    const HeadQueries& q = call.heads[head];
    Scratch& s = scratch();
    p.reset(call, piece, piece.by_code ? &s.sums : nullptr);
    ensure(s.scores, kRowBatch * kTile);
    // Rows that share the reading of a code go together.
    const int64_t together = piece.by_code ? s.sums.lanes() : kRowBatch;
    for (int64_t tile = piece.tile_begin; tile < piece.tile_end; ++tile) {
      if (tables_ && call.cache.policy().keeps_codes() && tile % kChunkTiles == 0)
        scan_chunk(call, piece, tile, std::min(piece.tile_end, tile + kChunkTiles), s);
      const int64_t begin = tile * kTile, count = std::min(kTile, call.tokens - begin);
      // Queries before the tile see nothing of it.
      const int64_t first_row = std::max(piece.row_begin, (begin - call.first) * call.group);
      if (first_row >= piece.row_end) continue;
      if (const RoleExtent e = call.extent(Role::kKey, begin, count);
          e.dropped && e.all_coded_end - e.coded_begin == count)
        continue;
      const TileForms k = load_keys(call, head, begin, count, s);
      load_key_scale(call, head, k, begin, s);
      const TileForms v = load_values(call, head, piece.by_code, begin, count, s);
      for (int64_t row = first_row; row < piece.row_end;) {
        const int64_t batch = std::min(together - (row - piece.row_begin) % together, piece.row_end - row);
        const int64_t seen = call.seen(row + batch - 1, begin, count), columns = padded(seen);
        score(call, head, k, begin, seen, row, batch, piece.row_begin, s);
        for (int64_t r = 0; r < batch; ++r) {
          const int64_t end =
              std::clamp<int64_t>(call.k_end[static_cast<size_t>((row + r) / call.group)] - begin, 0, seen);
          const int64_t coded = std::clamp<int64_t>(call.sinks - begin, 0, end);
          float* line = s.scores.data() + r * kTile;
          q.map_scores(row + r, coded, end, line);
          if (keep_logits) std::copy_n(line, seen, logits_.data() + (head * call.rows + row + r) * call.tokens + begin);
          p.absorb(row + r, line, columns, coded, end);
        }
        accumulate(call, v, p, begin, seen, row, batch, s);
        row += batch;
      }
    }
    p.unfold(call);
  }

  // out += p * v, in token order whatever the forms, but for sums by code.
  static void accumulate(const TiledCall& call, const TileForms& v, Partial& p, int64_t begin, int64_t count,
                         int64_t row, int64_t batch, Scratch& s) {
    const auto add_main = [&](int64_t r, int64_t n, int64_t from, int64_t to) {
      if (to > from)
        kernels::multiply(s.scores.data() + r * kTile + from, kTile, v.main + from * call.width, call.width,
                          p.out_row(row + r), call.width, n, to - from, call.width, true);
    };
    if (!(v.other || v.table) || count <= v.other_begin) {
      add_main(0, batch, 0, count);
      return;
    }
    const int64_t other_end = std::min(count, v.other_end);
    // Rows see ever later boundaries.
    const auto boundary = [&](int64_t i) {
      return std::clamp(call.v_end[static_cast<size_t>((row + i) / call.group)] - begin, v.other_begin, other_end);
    };
    add_main(0, batch, 0, v.other_begin);
    for (int64_t r = 0; r < batch;) {
      // Rows that see the same boundary go together.
      const int64_t end = boundary(r);
      int64_t n = 1;
      while (r + n < batch && boundary(r + n) == end) ++n;
      if (end > v.other_begin) {
        if (v.folded || v.table)
          for (int64_t i = r; i < r + n; ++i)
            p.weigh(row + i, s.scores.data() + i * kTile, v.other_begin, std::min(end, call.seen(row + i, begin, end)),
                    s.scale.data() + kTile);
        if (v.folded && !v.table) {
          kernels::multiply(s.scores.data() + r * kTile + v.other_begin, kTile, v.other + v.other_begin * p.y_stride,
                            p.y_stride, p.y_row(row + r), p.y_stride, n, end - v.other_begin, p.y_stride, true);
        } else if (!v.table) {
          kernels::multiply(s.scores.data() + r * kTile + v.other_begin, kTile, v.other + v.other_begin * call.width,
                            call.width, p.out_row(row + r), call.width, n, end - v.other_begin, call.width, true);
        }
      }
      add_main(r, n, end, other_end);
      r += n;
    }
    if (v.table) {
      const int64_t lanes = p.sums->lanes(), last = boundary(batch - 1), n = last - v.other_begin;
      if (n > 0) {
        for (int64_t r = batch; r < lanes; ++r) std::fill_n(s.scores.data() + r * kTile + v.other_begin, n, 0.0f);
        float* weights = ensure(s.weights, kTile * lanes);
        if (lanes == 1)
          std::copy_n(s.scores.data() + v.other_begin, n, weights);
        else
          kernels::transpose(s.scores.data() + v.other_begin, kTile, lanes, n, weights, lanes, false);
        for (int64_t r = 0; r < batch; ++r)
          for (int64_t t = boundary(r); t < last; ++t) weights[(t - v.other_begin) * lanes + r] = 0.0f;
        p.sums->add(row - p.piece.row_begin, weights, n, s.value_codes.data() + v.other_begin, kTile);
      }
    }
    add_main(0, batch, other_end, count);
  }

  void find_range(const TiledCall& call, int head, int64_t tile_begin, int64_t tile_end, ScoreRange& range) const {
    range.low.assign(static_cast<size_t>(call.rows), -kNegativeInfinity);
    range.high.assign(static_cast<size_t>(call.rows), kNegativeInfinity);
    Scratch& s = scratch();
    ensure(s.scores, kRowBatch * kTile);
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
      const int64_t begin = tile * kTile, count = std::min(kTile, call.tokens - begin);
      if (!call.extent(Role::kKey, begin, count).any_coded()) continue;
      const TileForms k = load_keys(call, head, begin, count, s);
      load_key_scale(call, head, k, begin, s);
      for (int64_t row = std::max<int64_t>(0, begin - call.first) * call.group; row < call.rows; row += kRowBatch) {
        const int64_t batch = std::min(kRowBatch, call.rows - row);
        const int64_t seen = call.seen(row + batch - 1, begin, count);
        score(call, head, k, begin, seen, row, batch, 0, s);
        for (int64_t r = 0; r < batch; ++r) {
          const int64_t end = std::min(seen, call.k_end[static_cast<size_t>((row + r) / call.group)] - begin);
          range.add(row + r, s.scores.data() + r * kTile, std::max<int64_t>(0, call.sinks - begin), end);
        }
      }
    }
  }

  void report(const TiledCall& call, int layer, AttentionTap& tap) const {
    Matrix<float> p(call.queries, call.tokens);
    for (int64_t h = 0; h < call.cache.shape().kv_heads; ++h) {
      for (int64_t g = 0; g < call.group; ++g) {
        for (int64_t i = 0; i < call.queries; ++i) {
          const float* line = logits_.data() + (h * call.rows + i * call.group + g) * call.tokens;
          const float top = *std::max_element(line, line + call.tokens);
          double sum = 0;
          for (int64_t t = 0; t < call.tokens; ++t)
            sum += p(i, t) = top == kNegativeInfinity ? 0.0f : std::exp(line[t] - top);
          for (int64_t t = 0; t < call.tokens; ++t) p(i, t) = sum > 0 ? static_cast<float>(p(i, t) / sum) : 0.0f;
        }
        tap.on_probabilities(layer, static_cast<int>(h * call.group + g), call.first, p);
      }
    }
  }

  KeyScan scan_ = KeyScan::kNone;
  ValueSums when_ = ValueSums::kNever;
  bool tables_ = false, summed_ = false;
  RotationTiles rotation_;
  std::vector<HeadQueries> queries_;
  std::vector<Partial> partials_;
  std::vector<ScoreRange> ranges_;
  AlignedVector<float> logits_;
};

class TiledBackend final : public AttentionBackend {
 public:
  TiledBackend(KeyScan scan, ValueSums sums) : scan_(scan), sums_(sums) {}
  std::string name() const override { return TiledEngine::path(scan_, false); }
  std::vector<std::string> paths() const override {
    return ran_.empty() ? std::vector{name()} : std::vector<std::string>(ran_.begin(), ran_.end());
  }
  std::optional<std::string> can(const DecodePlan& plan, Role role) const override {
    return scan_ != KeyScan::kNone && role == Role::kKey ? table_scan_reason(plan) : std::nullopt;
  }
  void attend(const CacheView& cache, int layer, ConstMatrix q, MutMatrix out, AttendStats* stats,
              AttentionTap* tap) override {
    ran_.insert(engine_.attend(scan_, sums_, cache, layer, q, out, stats, tap));
  }

 private:
  KeyScan scan_;
  ValueSums sums_;
  TiledEngine engine_;
  std::set<std::string> ran_;
};

// Single-query steps: keys by tables where every head of the layer can and that is cheaper, values summed by code where
// that is. Blocks of queries: everything decoded once for all of them. There tables and sums are built for every query:
// over 72 cells of `bench_attention --regret` with 128 queries and up to 8k tokens decoding is 5 % from the best on
// average, and loses most (1.5 times) at 8k tokens of a product code of 16 x 64 with d = 128.
class AutoBackend final : public AttentionBackend {
 public:
  std::string name() const override { return "auto"; }
  std::vector<std::string> paths() const override { return {ran_.begin(), ran_.end()}; }
  std::optional<std::string> can(const DecodePlan&, Role) const override { return std::nullopt; }
  void attend(const CacheView& cache, int layer, ConstMatrix q, MutMatrix out, AttendStats* stats,
              AttentionTap* tap) override {
    const bool table = q.rows == 1 && table_pays(cache, layer);
    ran_.insert(engine_.attend(table ? KeyScan::kFixed : KeyScan::kNone,
                               q.rows == 1 ? ValueSums::kWherePays : ValueSums::kNever, cache, layer, q, out, stats,
                               tap));
  }

 private:
  // A pure function of plan, group and coded tokens. Nanoseconds, measured as those of value_rule: columns keys+decode
  // and tab+decode.
  static bool table_pays(const CacheView& cache, int layer) {
    const double coded = static_cast<double>(cache.coded_end(Role::kKey, cache.length()) - cache.policy().sinks);
    if (!cache.policy().keeps_codes() || coded <= 0) return false;
    const double group = cache.shape().group(), d = cache.shape().head_dim;
    double table = 0, reconstruct = 0;
    for (const size_t u : cache.layer_units(layer)) {
      if (cache.unit_shape(u).role != Role::kKey) continue;
      if (table_scan_reason(cache.form(u).plan)) return false;
      for (const TileDecoder& decoder : cache.form(u).decoders) {
        double build = 0, books = 0;
        reconstruct += coded * (0.1 * d + 0.0172 * group * d);
        table += coded * 0.7 * group;
        for (const TileDecoder::Slot& s : decoder.slots()) {
          reconstruct += coded * (0.95 + 0.09 * s.width);
          // 16-bit lookups a row, or one load for the rows side by side.
          const double lanes = static_cast<double>(lanes_for(cache.shape().group()));
          table += coded * (scan::fixed_pays(s.entries) ? 0.053 * group : lanes == 1 ? 0.3 : 0.4 + 0.015 * lanes);
          build += s.entries * (0.6 + 0.25 * s.width);
          table += s.entries * group * (0.55 + 0.0167 * s.width);
          books += 4.0 * s.entries * s.width;
        }
        table += books > 0x1p20 ? 2.5 * build : build;  // books beyond the second-level cache
      }
    }
    return table < reconstruct;
  }

  TiledEngine engine_;
  std::set<std::string> ran_;
};

}  // namespace

std::optional<std::string> table_scan_reason(const DecodePlan& plan) {
  if (plan.rope == RopePlacement::kPre) return "keys coded before RoPE: one table cannot serve all positions";
  if (!plan.table_only() || plan.terms.empty()) return "the plan has terms that are not tables";
  if (plan.layout.overlay) return "exact exceptions change single channels of decoded keys";
  if (plan.score.kind != ScoreMap::Kind::kNone) return "a score map needs two passes over the coded segment";
  if (plan.token_scale_side >= 0 && plan.layout.sides[static_cast<size_t>(plan.token_scale_side)].slots > 1)
    return "more than one token scale a unit";
  return std::nullopt;
}

std::unique_ptr<AttentionBackend> make_tiled_backend(KeyScan scan, ValueSums sums) {
  return std::make_unique<TiledBackend>(scan, sums);
}
std::unique_ptr<AttentionBackend> make_auto_backend() { return std::make_unique<AutoBackend>(); }

}  // namespace vqkv
