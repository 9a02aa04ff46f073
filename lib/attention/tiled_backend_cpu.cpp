// cpu-reconstruct, cpu-table and cpu-table8.
//
// cpu-reconstruct: tiles of 128 tokens are brought to fp32 (from exact rows or codes), then attended by every query of
// the block and every query head of the group; no more than a tile per thread is ever dequantized.
//
// Tiles and chunks of tiles are cut at absolute token positions (of what a head has left, once a policy takes tokens
// out), whatever form the tokens have, and every sum runs in token order (core/small_matrix.h). So an identity codec
// gives the bits of the exact cache, a block of queries those of single steps, and the thread count changes nothing.
//
// cpu-table: the same tiles and sums, but logits of coded keys are sums of table entries (scan_cpu.h) or of levels that
// are unpacked in registers (level_tiles_cpu.h), and no key is decoded, but levels of heads that have lost tokens.
// Values are summed by code in the segments where that is cheaper: tables by code_sums_cpu.h, levels where they lie;
// elsewhere they are decoded. What summed any by code calls itself cpu-table-sums.
//
// cpu-table8: cpu-table with 8-bit tables for the rows whose error bound stays below scan::kByteScanLimit; the others
// are scanned as cpu-table scans them. Never chosen by auto.
#include <algorithm>
#include <cmath>
#include <deque>
#include <set>

#include "attention/backends_cpu.h"
#include "attention/code_sums_cpu.h"
#include "attention/kernels_cpu.h"
#include "attention/level_tiles_cpu.h"
#include "attention/scan_cpu.h"
#include "attention/tile_parts_cpu.h"
#include "core/error.h"
#include "core/thread_pool.h"

namespace vqkv {
namespace {

constexpr int64_t kQueryBlock = 256;  // queries that share one decoding of a tile; bounds the partial states
constexpr int64_t kTableFloats = int64_t{1} << 23;  // 32 MiB of tables a call

TileScratch& scratch() { return PerThread<TileScratch>::here(); }

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
                     AttendStats* stats, AttentionTap* tap, MassRequest* mass) {
    if (cache.recalled() && scan != KeyScan::kNone)
      fail_unavailable(path(scan, false) +
                       " scores keys by their codes and sees no pairs of a far tier; "
                       "take --attention cpu-reconstruct or reference");
    scan_ = scan;
    when_ = cache.recalled() ? ValueSums::kNever : sums;
    summed_ = false;
    if (q.rows < rows_) {  // what a larger block needed is given back
      const auto release = [](auto& v) { std::remove_reference_t<decltype(v)>().swap(v); };
      release(queries_);
      release(partials_);
      release(ranges_);
      release(states_);
    }
    rows_ = q.rows;
    int64_t step = tap ? q.rows : kQueryBlock;  // a tap is called once a block
    if (scan_ != KeyScan::kNone && cache.policy().keeps_codes()) {
      int64_t entries = 1;  // table entries of one query, all heads
      for (int tier = 0; tier < cache.tiers(); ++tier)
        for (const size_t u : cache.layer_units(layer, tier)) {
          if (cache.unit_shape(u).role != Role::kKey) continue;
          if (const auto reason = table_scan_reason(cache.form(u).plan))
            fail_unavailable(path(scan, false) + " cannot run layer " + std::to_string(layer) + ": " + *reason);
          for (const TileDecoder& d : cache.form(u).decoders) {
            if (cache.form(u).plan.rope == RopePlacement::kPre && !d.pairs())
              fail_unavailable(path(scan, false) + " cannot run layer " + std::to_string(layer) +
                               ": codewords of keys before RoPE hold other pairs than it turns");
            for (const TileDecoder::CodeSlot& s : d.code_slots()) entries += cache.shape().group() * s.entries;
          }
        }
      if (!tap) step = std::clamp<int64_t>(kTableFloats / entries, 1, kQueryBlock);
    }
    for (int64_t first = 0; first < q.rows; first += step) {
      const int64_t n = std::min(step, q.rows - first);
      attend_block(cache, layer, cache.length() + first, q.slice_rows(first, n), out.slice_rows(first, n), stats, tap,
                   mass);
    }
    return path(scan, summed_);
  }

  int64_t held_bytes() const {
    return rotation_.held_bytes() + held_in(queries_) + held_in(partials_) + held_in(ranges_) + capacity_bytes(states_);
  }

 private:
  void attend_block(const CacheView& cache, int layer, int64_t first, ConstMatrix q, MutMatrix out, AttendStats* stats,
                    AttentionTap* tap, MassRequest* mass) {
    const int64_t heads = cache.shape().kv_heads;
    const int tiers = cache.tiers();
    std::deque<TiledCall> calls;  // a segment each
    queries_.resize(static_cast<size_t>(tiers * heads));
    for (int key_tier = 0; key_tier < tiers; ++key_tier) {
      HeadQueries* const of_tier = queries_.data() + key_tier * heads;
      const size_t before = calls.size();
      for (int value_tier = 0; value_tier < tiers; ++value_tier) {
        calls.emplace_back(cache, layer, first, q.rows, rotation_, key_tier, value_tier).heads = of_tier;
        if (tiers > 1 && calls.back().empty()) calls.pop_back();
      }
      if (calls.size() == before) continue;
      parallel_for(heads, [&](int64_t h) {
        of_tier[h].prepare(calls.back(), static_cast<int>(h), q, cache.policy().keeps_codes() ? scan_ : KeyScan::kNone);
      });
    }
    // Score maps and masses are of caches with one tier.
    TiledCall& call = calls.front();
    const int64_t chunks = (call.tiles + kChunkTiles - 1) / kChunkTiles;
    // A score map needs the extremes of the whole coded segment before any probability.
    bool mapped = false;
    for (int h = 0; h < heads; ++h) mapped = mapped || call.score_map(h).kind != ScoreMap::Kind::kNone;
    VQKV_CHECK(tiers == 1 || !(mapped || mass));
    if (mapped) {
      ranges_.resize(static_cast<size_t>(chunks * heads));
      parallel_for(chunks * heads, [&](int64_t item) {
        const int64_t chunk = item / heads;
        find_range(call, static_cast<int>(item % heads), chunk * kChunkTiles, ranges_[static_cast<size_t>(item)]);
      });
      for (int h = 0; h < heads; ++h)
        queries_[static_cast<size_t>(h)].set_score_map(call, call.score_map(h), ranges_, chunks, heads, h);
    }
    const std::vector<Piece> pieces = cut(calls);
    if (partials_.size() < pieces.size()) partials_.resize(pieces.size());
    parallel_for(static_cast<int64_t>(pieces.size()), [&](int64_t i) {
      const Piece& piece = pieces[static_cast<size_t>(i)];
      run_piece(calls[piece.segment], piece, partials_[static_cast<size_t>(i)]);
    });
    merge_partials(call, partials_, pieces.size(), out, stats, tap || mass ? &states_ : nullptr);
    if (mass) observe(call, chunks, *mass);
    if (tap) report(calls, layer, *tap);
  }

  // The mass of each token, by a second pass over the keys: no more than a tile of scores a thread. Rows come in
  // order, so blocks give the bits of steps.
  void observe(const TiledCall& call, int64_t chunks, MassRequest& mass) {
    const int64_t from = std::max(mass.from, call.first), to = std::min(mass.to, call.first + call.queries);
    if (from >= to) return;
    const int64_t heads = call.cache.shape().kv_heads;
    parallel_for(chunks * heads, [&](int64_t item) {
      const Piece piece{static_cast<int>(item % heads), item / heads * kChunkTiles, (item / heads + 1) * kChunkTiles,
                        (from - call.first) * call.group, (to - call.first) * call.group};
      visit_scores(call, piece, [&](int64_t row, int64_t begin, int64_t count, float* line) {
        const RowState& state = states_[static_cast<size_t>(piece.head * call.rows + row)];
        const double share = 1.0 / static_cast<double>(state.sum);
        kernels::exp_row(line, padded(count), state.top);
        double* received = mass.received[static_cast<size_t>(piece.head)].data() + begin;
        for (int64_t t = 0; t < count; ++t) received[t] += share * static_cast<double>(line[t]);
      });
    });
  }

  // visit(row, begin, count, logits) for each row of the piece and each tile that it sees something of, tile by tile,
  // rows in order: logits of columns [begin, begin + count), padded with -inf, the visitor's to change.
  template <class Visit>
  void visit_scores(const TiledCall& call, const Piece& piece, Visit&& visit) const {
    TileScratch& s = scratch();
    ensure_floats(s.scores, kRowBatch * kTile);
    const int64_t tiles = std::min(piece.tile_end, call.columns(piece.head).tiles());
    for (int64_t tile = piece.tile_begin; tile < tiles; ++tile) {
      if (scan_ != KeyScan::kNone && call.cache.policy().keeps_codes() && tile % kChunkTiles == 0)
        scan_key_chunk(call, piece, tile, std::min(tiles, tile + kChunkTiles), s);
      const int64_t begin = tile * kTile, count = std::min(kTile, call.columns(piece.head).tokens - begin);
      const int64_t first_row = std::max(piece.row_begin, call.first_row(piece.head, begin));
      if (first_row >= piece.row_end || nothing_seen(call, piece.head, begin, count)) continue;
      const TileForms k = load_key_tile(call, piece.head, scan_, begin, count, s);
      for (int64_t row = first_row; row < piece.row_end; row += kRowBatch) {
        const int64_t batch = std::min(kRowBatch, piece.row_end - row);
        const int64_t seen = call.seen(piece.head, row + batch - 1, begin, count);
        score_tile(call, piece.head, k, begin, seen, row, batch, piece.row_begin, s);
        for (int64_t r = 0; r < batch; ++r) {
          const auto [coded, end] = call.coded_keys(piece.head, row + r, begin, seen);
          float* line = s.scores.data() + r * kTile;
          call.heads[piece.head].map_scores(row + r, coded, end, line);
          visit(row + r, begin, seen, line);
        }
      }
    }
  }

  static bool nothing_seen(const TiledCall& call, int head, int64_t begin, int64_t count) {
    const RoleExtent e = call.extent(head, Role::kKey, begin, count);
    return e.begin == count || (e.dropped && e.all_coded_end - e.coded_begin == count);
  }

  // Spans whose rows sum by code where enough of it is coded, then chunks for all other rows: the long pieces first, to
  // end together.
  std::vector<Piece> cut(const std::deque<TiledCall>& calls) {
    std::vector<Piece> pieces, chunks;
    for (int head = 0; head < calls.front().cache.shape().kv_heads; ++head)
      for (size_t segment = 0; segment < calls.size(); ++segment) cut(calls[segment], segment, head, pieces, chunks);
    summed_ = summed_ || !pieces.empty();
    pieces.insert(pieces.end(), chunks.begin(), chunks.end());
    return pieces;
  }

  void cut(const TiledCall& call, size_t segment, int head, std::vector<Piece>& pieces,
           std::vector<Piece>& chunks) const {
    const HeadColumns& columns = call.columns(head);
    const int64_t tiles = columns.tiles();
    ValueRule rule;
    int64_t rows_at_once = call.rows;
    if (const int unit = call.coded_unit(head, Role::kValue); unit >= 0 && call.cache.policy().codes) {
      const TileDecoder& decoder = call.decoder(head, Role::kValue);
      // Levels are summed where they lie, in the order of the tokens.
      if (columns.whole || !decoder.only_levels())
        rule = value_rule(call.cache.form(static_cast<size_t>(unit)).plan, decoder, call.group, when_);
      if (rule.segment > 0) rows_at_once = summed_rows(decoder);
    }
    const int64_t span = rule.segment > 0 ? rule.segment / kTile : std::max<int64_t>(kChunkTiles, tiles);
    const int64_t first = columns.from.front() / kTile;
    for (int64_t begin = first / span * span; begin < tiles; begin += span) {
      const int64_t end = std::min(tiles, begin + span);
      const auto by_code = [&](int64_t row) {
        return rule.segment > 0 && call.coded_values(head, row, begin * kTile, end * kTile) >= rule.least;
      };
      // Runs of rows that take one way.
      for (int64_t row = 0, last = 0; row < call.rows; row = last) {
        const bool sums = by_code(row);
        for (last = row + call.group; last < call.rows && by_code(last) == sums;) last += call.group;
        for (int64_t r = row; sums && r < last; r += rows_at_once)
          pieces.push_back({head, begin, end, r, std::min(last, r + rows_at_once), true, segment});
        for (int64_t tile = std::max(begin, first / kChunkTiles * kChunkTiles); !sums && tile < end;
             tile += kChunkTiles)
          chunks.push_back({head, tile, std::min(end, tile + kChunkTiles), row, last, false, segment});
      }
    }
  }

  void run_piece(const TiledCall& call, const Piece& piece, Partial& p) {
    const int head = piece.head;
    const HeadQueries& q = call.heads[head];
    TileScratch& s = scratch();
    p.reset(call, piece, piece.by_code && !call.decoder(head, Role::kValue).only_levels() ? &s.sums : nullptr);
    ensure_floats(s.scores, kRowBatch * kTile);
    forget_levels();
    // Rows that share the reading of a code go together.
    const int64_t together = p.sums ? s.sums.lanes() : kRowBatch;
    for (int64_t tile = piece.tile_begin; tile < piece.tile_end; ++tile) {
      if (scan_ != KeyScan::kNone && call.cache.policy().keeps_codes() && tile % kChunkTiles == 0)
        scan_key_chunk(call, piece, tile, std::min(piece.tile_end, tile + kChunkTiles), s);
      const int64_t begin = tile * kTile, count = std::min(kTile, call.columns(head).tokens - begin);
      // Queries before the tile see nothing of it.
      const int64_t first_row = std::max(piece.row_begin, call.first_row(head, begin));
      if (first_row >= piece.row_end || nothing_seen(call, head, begin, count)) continue;
      const TileForms k = load_key_tile(call, head, scan_, begin, count, s);
      const TileForms v = load_value_tile(call, head, piece.by_code, begin, count, s);
      for (int64_t row = first_row; row < piece.row_end;) {
        const int64_t batch = std::min(together - (row - piece.row_begin) % together, piece.row_end - row);
        const int64_t seen = call.seen(head, row + batch - 1, begin, count), columns = padded(seen);
        score_tile(call, head, k, begin, seen, row, batch, piece.row_begin, s);
        for (int64_t r = 0; r < batch; ++r) {
          const auto [coded, end] = call.coded_keys(piece.head, row + r, begin, seen);
          float* line = s.scores.data() + r * kTile;
          q.map_scores(row + r, coded, end, line);
          p.absorb(row + r, line, columns, coded, end);
        }
        sum_tile(call, v, p, begin, seen, row, batch, s);
        row += batch;
      }
    }
    p.unfold(call);
  }

  void find_range(const TiledCall& call, int head, int64_t tile, ScoreRange& range) const {
    range.low.assign(static_cast<size_t>(call.rows), -kNegativeInfinity);
    range.high.assign(static_cast<size_t>(call.rows), kNegativeInfinity);
    visit_scores(call, {head, tile, tile + kChunkTiles, 0, call.rows},
                 [&](int64_t row, int64_t begin, int64_t count, const float* line) {
                   const auto [coded, end] = call.coded_keys(head, row, begin, count);
                   range.add(row, line, coded, end);
                 });
  }

  void report(const std::deque<TiledCall>& calls, int layer, AttentionTap& tap) const {
    const TiledCall& any = calls.front();
    for (int head = 0; head < any.cache.shape().kv_heads; ++head) {
      std::vector<Matrix<float>> p(static_cast<size_t>(any.group), Matrix<float>(any.queries, any.first + any.queries));
      for (const TiledCall& call : calls) {
        const HeadColumns& columns = call.columns(head);
        visit_scores(call, {head, 0, columns.tiles(), 0, call.rows},
                     [&](int64_t row, int64_t begin, int64_t count, float* line) {
                       const RowState& state = states_[static_cast<size_t>(head * call.rows + row)];
                       kernels::exp_row(line, padded(count), state.top);
                       float* to = p[static_cast<size_t>(row % call.group)].row(row / call.group);
                       // What another segment holds is 0 here.
                       for (int64_t t = 0; t < count; ++t)
                         to[columns.whole ? begin + t : columns.position[static_cast<size_t>(begin + t)]] +=
                             line[t] / state.sum;
                     });
      }
      for (int64_t g = 0; g < any.group; ++g)
        tap.on_probabilities(layer, static_cast<int>(head * any.group + g), any.first, p[static_cast<size_t>(g)]);
    }
  }

  KeyScan scan_ = KeyScan::kNone;
  ValueSums when_ = ValueSums::kNever;
  bool summed_ = false;
  int64_t rows_ = 0;  // of the last block
  RotationTiles rotation_;
  std::vector<HeadQueries> queries_;
  std::vector<Partial> partials_;
  std::vector<ScoreRange> ranges_;
  RowStates states_;
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
  void attend(const CacheView& cache, int layer, ConstMatrix q, MutMatrix out, AttendStats* stats, AttentionTap* tap,
              MassRequest* mass) override {
    ran_.insert(engine_.attend(scan_, sums_, cache, layer, q, out, stats, tap, mass));
  }
  int64_t held_bytes() const override { return engine_.held_bytes(); }

 private:
  KeyScan scan_;
  ValueSums sums_;
  TiledEngine engine_;
  std::set<std::string> ran_;
};

// Single-query steps: keys by tables where every head of the layer can and that is cheaper, values summed by code where
// that is. Blocks of queries: everything decoded once for all of them. There tables and sums are built for every query:
// over 108 cells of `bench_attention --regret` with 128 queries and up to 8k tokens decoding is 5 % from the best on
// average, and loses most (1.55 times) at 8k tokens of a product code of 16 x 64 with d = 128.
class AutoBackend final : public AttentionBackend {
 public:
  std::string name() const override { return "auto"; }
  std::vector<std::string> paths() const override { return {ran_.begin(), ran_.end()}; }
  std::optional<std::string> can(const DecodePlan&, Role) const override { return std::nullopt; }
  void attend(const CacheView& cache, int layer, ConstMatrix q, MutMatrix out, AttendStats* stats, AttentionTap* tap,
              MassRequest* mass) override {
    const bool table = q.rows == 1 && table_pays(cache, layer);
    ran_.insert(engine_.attend(table ? KeyScan::kFixed : KeyScan::kNone,
                               q.rows == 1 ? ValueSums::kWherePays : ValueSums::kNever, cache, layer, q, out, stats,
                               tap, mass));
  }
  int64_t held_bytes() const override { return engine_.held_bytes(); }

 private:
  // A pure function of plan, group and coded tokens. Nanoseconds, measured as those of value_rule: columns keys+decode
  // and tab+decode.
  static bool table_pays(const CacheView& cache, int layer) {
    if (!cache.policy().keeps_codes()) return false;
    double table = 0, reconstruct = 0;
    for (int tier = 0; tier < cache.tiers(); ++tier)
      if (!add_costs(cache, layer, tier, table, reconstruct)) return false;
    return table < reconstruct;
  }
  // Adds those of one tier; false where its keys can't be scored by tables.
  static bool add_costs(const CacheView& cache, int layer, int tier, double& table, double& reconstruct) {
    const int64_t begin =
        tier + 1 < cache.tiers() ? cache.coded_end(Role::kKey, cache.length(), tier + 1) : cache.policy().sinks;
    const auto coded = static_cast<double>(cache.coded_end(Role::kKey, cache.length(), tier) - begin);
    const double group = cache.shape().group(), d = cache.shape().head_dim;
    for (const size_t u : cache.layer_units(layer, tier)) {
      if (cache.unit_shape(u).role != Role::kKey) continue;
      if (table_scan_reason(cache.form(u).plan)) return false;  // whether anything is in the tier yet or not
      if (coded <= 0) continue;
      for (const TileDecoder& decoder : cache.form(u).decoders) {
        if (decoder.pairs()) {  // the same sums either way, but neither tables nor a tile of keys
          reconstruct += coded;
          continue;
        }
        double build = 0, books = 0;
        reconstruct += coded * (0.1 * d + 0.0172 * group * d);
        // 16-bit lookups a row, or one load for the rows side by side.
        const auto per_code = [&](int entries) {
          const double lanes = static_cast<double>(lanes_for(cache.shape().group()));
          return scan::fixed_pays(entries) ? 0.053 * group : lanes == 1 ? 0.3 : 0.4 + 0.015 * lanes;
        };
        table += coded * 0.7 * group;
        for (const TileDecoder::Slot& s : decoder.slots()) {
          reconstruct += coded * (0.95 + 0.09 * s.width);
          table += coded * per_code(s.entries);
          build += s.entries * (0.6 + 0.25 * s.width);
          table += s.entries * group * (0.55 + 0.0167 * s.width);
          books += 4.0 * s.entries * s.width;
        }
        // Of signs by their multiply-adds and lookups, at the rates above.
        for (const TileDecoder::Signs& s : decoder.signs()) {
          const double rows = s.term.rows, each = rows * s.width;
          reconstruct += coded * (0.11 * rows + 0.0172 * each);
          table += coded * s.term.slots() * per_code(1 << 8);
          build += 0.25 * each + group * (0.0172 * each + s.term.slots() * 256 * 0.55);
        }
        if (decoder.only_levels()) {
          const auto width = static_cast<double>(decoder.code_width());
          reconstruct += coded * 0.4 * width;
          table += coded * width * (0.02 + 0.018 * group);
        }
        table += books > 0x1p20 ? 2.5 * build : build;  // books beyond the second-level cache
      }
    }
    return true;
  }

  TiledEngine engine_;
  std::set<std::string> ran_;
};

}  // namespace

int64_t TileScratch::held_bytes() const {
  int64_t n = capacity_bytes(codes) + capacity_bytes(wide_codes) + capacity_bytes(value_codes) +
              capacity_bytes(loudest) + sums.held_bytes();
  for (const AlignedVector<float>* v :
       {&keys, &other_keys, &values, &other_values, &scores, &other_scores, &scale, &table_scores, &run_scores,
        &run_scale, &weights, &wide_sums, &wide_scores, &pair_sums, &pair_queries, &pair_phases})
    n += capacity_bytes(*v);
  return n;
}

int64_t attention_scratch_bytes() {
  return PerThread<TileScratch>::held_bytes() + level_scratch_bytes() + tile_decoder_scratch_bytes();
}

std::optional<std::string> table_scan_reason(const DecodePlan& plan) {
  if (const auto reason = plan.rope == RopePlacement::kPre ? pair_sum_reason(plan) : std::nullopt)
    return "keys coded before RoPE: one table cannot serve all positions, and " + *reason;
  if (plan.score.kind != ScoreMap::Kind::kNone) return "a score map needs two passes over the coded segment";
  return code_domain_reason(plan);
}

std::unique_ptr<AttentionBackend> make_tiled_backend(KeyScan scan, ValueSums sums) {
  return std::make_unique<TiledBackend>(scan, sums);
}
std::unique_ptr<AttentionBackend> make_auto_backend() { return std::make_unique<AutoBackend>(); }

}  // namespace vqkv
