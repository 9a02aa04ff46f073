#include "attention/tiled_cpu.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "core/finite.h"
#include "core/index.h"
#include "core/round_up.h"
#include "core/small_matrix.h"
#include "core/thread_pool.h"

namespace vqkv {
namespace {

// Columns of a head, `all` being those of one that has lost nothing.
HeadColumns columns_of(const CacheView& cache, int layer, int head, const HeadColumns& all) {
  if (!cache.any_evicted(layer, head)) return all;
  HeadColumns c;
  c.whole = false;
  c.position = cache.seen(layer, head);
  c.position.resize(at(std::lower_bound(c.position.begin(), c.position.end(), all.tokens) - c.position.begin()));
  c.tokens = static_cast<int64_t>(c.position.size());
  const auto before = [&](int64_t position) {
    return std::lower_bound(c.position.begin(), c.position.end(), position) - c.position.begin();
  };
  c.sinks = before(all.sinks);
  const auto ends = [&](const std::vector<int64_t>& from, std::vector<int64_t>& to) {
    for (const int64_t position : from) to.push_back(before(position));
  };
  ends(all.seen, c.seen);
  ends(all.k_end, c.k_end);
  ends(all.v_end, c.v_end);
  c.from = all.from;  // no segment but one loses tokens
  for (const Role role : {Role::kKey, Role::kValue}) {
    const int unit = cache.policy().keeps_codes() ? cache.unit_of(layer, head, role) : -1;
    if (unit < 0) continue;
    std::vector<int32_t>& slot = role == Role::kKey ? c.k_slot : c.v_slot;
    const std::span<const int32_t> listed = cache.slot_positions(static_cast<size_t>(unit));
    const bool whole = !cache.lists_slots(static_cast<size_t>(unit));
    const int64_t end = before(cache.coded_end(layer, role));
    for (int64_t i = c.sinks; i < end; ++i) {
      const int32_t position = c.position[at(i)];
      slot.push_back(
          whole ? position - static_cast<int32_t>(all.sinks)
                : static_cast<int32_t>(std::lower_bound(listed.begin(), listed.end(), position) - listed.begin()));
    }
  }
  return c;
}

// out[b] = factor * sum of v[i] where bit i of b is set, and of -v[i] elsewhere; v: (8).
void sum_signs(const float* v, float factor, float* out) {
  out[0] = 0;
  for (int i = 0; i < 8; ++i) out[0] -= factor * v[i];
  for (int i = 0; i < 8; ++i)
    for (int b = 0; b < 1 << i; ++b) out[b + (1 << i)] = out[b] + 2 * factor * v[i];
}

}  // namespace

void RotationTiles::grow(const RopeTable& rope, int64_t tiles) {
  if (rope.facts().inverse_frequency != frequencies_ || rope.facts().attention_factor != factor_) {  // another model
    tiles_.clear();
    frequencies_ = rope.facts().inverse_frequency;
    factor_ = rope.facts().attention_factor;
    half_ = rope.facts().rotary_dim / 2;
  }
  while (static_cast<int64_t>(tiles_.size()) < tiles) {
    const int64_t first = static_cast<int64_t>(tiles_.size()) * kTile;
    AlignedVector<float> tile(at(2 * half_ * kTile));
    for (int64_t t = 0; t < kTile; ++t) {
      const float* row = rope.row(first + t);
      for (int64_t p = 0; p < 2 * half_; ++p) tile[at(p * kTile + t)] = row[p];
    }
    tiles_.push_back(std::move(tile));
  }
}

int64_t RotationTiles::held_bytes() const {
  int64_t bytes = capacity_bytes(frequencies_) + capacity_bytes(tiles_);
  for (const AlignedVector<float>& tile : tiles_) bytes += capacity_bytes(tile);
  return bytes;
}

void RotationTiles::rotate(float* keys, int64_t tile, int64_t from, int64_t to) const {
  const float* cosine = tiles_[at(tile)].data();
  const float* sine = cosine + half_ * kTile;
  for (int64_t p = 0; p < half_; ++p) {
    float* __restrict low = keys + p * kTile;
    float* __restrict high = keys + (p + half_) * kTile;
    const float* c = cosine + p * kTile;
    const float* s = sine + p * kTile;
    for (int64_t t = from; t < to; ++t) {
      const float a = low[t], b = high[t];
      low[t] = a * c[t] - b * s[t];
      high[t] = a * s[t] + b * c[t];
    }
  }
}

void RotationTiles::rotate(float* keys, const int32_t* positions, int64_t from, int64_t to) const {
  for (int64_t p = 0; p < half_; ++p) {
    float* low = keys + p * kTile;
    float* high = keys + (p + half_) * kTile;
    for (int64_t t = from; t < to; ++t) {
      const float* tile = tiles_[at(positions[t] / kTile)].data() + p * kTile + positions[t] % kTile;
      const float a = low[t], b = high[t], c = tile[0], s = tile[half_ * kTile];
      low[t] = a * c - b * s;
      high[t] = a * s + b * c;
    }
  }
}

TiledCall::TiledCall(const CacheView& view, int layer_in, int64_t first_in, int64_t queries_in,
                     RotationTiles& rotation_in, int key_tier_in, int value_tier_in)
    : cache(view),
      rotation(&rotation_in),
      layer(layer_in),
      key_tier(key_tier_in),
      value_tier(value_tier_in),
      first(first_in),
      queries(queries_in),
      d(view.shape().head_dim),
      width(padded(d)),
      group(view.shape().group()),
      rows(queries_in * group) {
  const int64_t tokens = first + queries;
  VQKV_CHECK(tokens <= cache.tokens(layer));
  all.sinks = cache.policy().sinks;
  all.tokens = tokens;
  for (int64_t i = 0; i < queries; ++i) {
    all.seen.push_back(first + i + 1);
    all.k_end.push_back(cache.coded_end(Role::kKey, first + i));
    all.v_end.push_back(cache.coded_end(Role::kValue, first + i));
  }
  // A query that sees nothing exact past its boundary takes the next query's: rows with one boundary go together.
  for (std::vector<int64_t>* end : {&all.k_end, &all.v_end})
    for (int64_t i = queries - 2; i >= 0; --i)
      if ((*end)[at(i)] == first + i + 1) (*end)[at(i)] = (*end)[at(i + 1)];
  all.from.assign(at(queries), 0);
  for (const Role role : {Role::kKey, Role::kValue}) {
    const int own = tier(role);
    for (int64_t i = 0; i < queries; ++i) {
      if (own + 1 < cache.tiers())
        all.from[at(i)] = std::max(all.from[at(i)], cache.coded_end(role, first + i, own + 1));
      if (own > 0) all.seen[at(i)] = std::min(all.seen[at(i)], cache.coded_end(role, first + i, own));
    }
  }
  all.tokens = all.seen.back();
  // What a query sees of an older tier is coded.
  if (key_tier > 0) all.k_end.assign(at(queries), all.tokens);
  if (value_tier > 0) all.v_end.assign(at(queries), all.tokens);
  tiles = all.tiles();
  bool pre = false, lost = false;
  const int kv_heads = cache.shape().kv_heads;
  for (int h = 0; h < kv_heads; ++h) {
    pre = pre || !cache.keys_post_rope(layer, h);
    lost = lost || cache.any_evicted(layer, h);
  }
  if (pre) rotation_in.grow(cache.rope(), tiles);
  if (!lost) return;
  tiles = 0;
  for (int h = 0; h < kv_heads; ++h) {
    own.push_back(columns_of(cache, layer, h, all));
    tiles = std::max(tiles, own.back().tiles());
  }
}

bool TiledCall::empty() const {
  for (int64_t i = 0; i < queries; ++i)
    if (all.seen[at(i)] > all.from[at(i)]) return false;
  return true;
}

RoleExtent TiledCall::extent(int head, Role role, int64_t begin, int64_t count) const {
  const HeadColumns& c = columns(head);
  const std::vector<int64_t>& ends = c.end(role);
  RoleExtent e;
  e.dropped = drops();
  const int64_t query = std::min(first_row(head, begin) / group, queries - 1);
  e.begin = std::clamp<int64_t>(c.from[at(query)] - begin, 0, count);
  e.coded_begin = std::clamp<int64_t>(c.sinks - begin, e.begin, count);
  e.all_coded_end = std::clamp(ends[at(query)] - begin, e.coded_begin, count);
  e.any_coded_end = std::clamp(ends.back() - begin, e.coded_begin, count);
  return e;
}

int64_t TiledCall::first_row(int head, int64_t begin) const {
  const HeadColumns& c = columns(head);
  if (c.whole && key_tier == 0 && value_tier == 0) return std::max<int64_t>(0, begin - first) * group;
  return (std::upper_bound(c.seen.begin(), c.seen.end(), begin) - c.seen.begin()) * group;
}

const ScoreMap& TiledCall::score_map(int head) const {
  static const ScoreMap none;
  return coded_unit(head, Role::kKey) < 0 ? none : cache.plan(layer, head, Role::kKey, key_tier).score;
}

CodedQueries TiledCall::coded_queries(int head) const {
  const auto unit = static_cast<size_t>(coded_unit(head, Role::kKey));
  return {cache.form(unit).plan, head - cache.unit_shape(unit).first_head, static_cast<int>(d)};
}

template <class Body>
void TiledCall::for_runs(int head, Role role, int64_t first_column, int64_t count, Body&& body) const {
  const HeadColumns& c = columns(head);
  if (c.whole) {
    body(first_column, count, 0);
    return;
  }
  const int32_t* slot = (role == Role::kKey ? c.k_slot : c.v_slot).data() + first_column;
  for (int64_t i = 0, n = 0; i < count; i += n) {
    n = 1;
    while (i + n < count && slot[i + n] == slot[i] + n) ++n;
    body(slot[i], n, i);
  }
}

void TiledCall::load_exact(int head, Role role, int64_t first_column, int64_t count, float* out, int64_t stride) const {
  const HeadColumns& c = columns(head);
  for (int64_t i = 0, n = 0; i < count; i += n) {
    int64_t position = first_column + i;
    n = count;
    if (!c.whole) {
      const int32_t* from = c.position.data() + position;
      position = *from;
      n = 1;
      while (i + n < count && from[n] == position + n) ++n;
    }
    if (role == Role::kKey)
      cache.load_keys(layer, head, position, n, out + i, stride);
    else
      cache.load_values(layer, head, position, n, out + i * stride, stride);
  }
}

void TiledCall::decode(int head, Role role, int64_t first_column, int64_t count, float* out, int64_t stride) const {
  const TileDecoder& own = decoder(head, role);
  const CodedBody coded = body(head, role);
  for_runs(head, role, first_column, count, [&](int64_t slot, int64_t n, int64_t i) {
    if (role == Role::kKey)
      own.keys(coded, slot, n, out + i, stride);
    else
      own.values(coded, slot, n, out + i * stride, stride);
  });
  add_lower(head, role, first_column, count, out, stride);
  if (!cache.recalled()) return;
  VQKV_CHECK(columns(head).whole);
  const RecalledPairs::Head& pairs = cache.recalled()->head(layer, head);
  const int64_t begin = columns(head).sinks + first_column;
  cache.recalled()->visit(layer, head, begin, begin + count, [&](int64_t i, int64_t position) {
    if (role == Role::kValue)
      std::copy_n(pairs.v.row(i), d, out + (position - begin) * stride);
    else
      for (int64_t c = 0; c < d; ++c) out[c * stride + position - begin] = pairs.k(i, c);
  });
}

void TiledCall::add_lower(int head, Role role, int64_t first_column, int64_t count, float* out, int64_t stride) const {
  AlignedVector<float> rows;
  int unit = cache.added_unit(static_cast<size_t>(coded_unit(head, role)));
  for (int below = layer - 1; unit >= 0; --below, unit = cache.added_unit(static_cast<size_t>(unit))) {
    rows.resize(at(count * width));
    for_runs(head, role, first_column, count, [&](int64_t slot, int64_t n, int64_t i) {
      cache.decoder(below, head, role).rows(cache.body(below, head, role), slot, n, rows.data() + i * width, width);
    });
    if (role == Role::kKey) {
      kernels::transpose(rows.data(), width, count, d, out, stride, true);
      continue;
    }
    for (int64_t t = 0; t < count; ++t)
      for (int64_t c = 0; c < d; ++c) out[t * stride + c] += rows[at(t * width + c)];
  }
}

void TiledCall::token_scale(int head, Role role, int64_t first_column, int64_t count, float* out) const {
  const TileDecoder& own = decoder(head, role);
  const CodedBody coded = body(head, role);
  for_runs(head, role, first_column, count,
           [&](int64_t slot, int64_t n, int64_t i) { own.token_scale(coded, slot, n, out + i); });
}

void TiledCall::codes(int head, Role role, int64_t first_column, int64_t count, uint16_t* out, int64_t stride) const {
  const TileDecoder& own = decoder(head, role);
  const CodedBody coded = body(head, role);
  for_runs(head, role, first_column, count,
           [&](int64_t slot, int64_t n, int64_t i) { own.codes(coded, slot, n, out + i, stride); });
}

void ScoreRange::add(int64_t row, const float* line, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    if (line[t] == kNegativeInfinity) continue;
    low[at(row)] = std::min(low[at(row)], line[t]);
    high[at(row)] = std::max(high[at(row)], line[t]);
  }
}

int64_t HeadQueries::held_bytes() const {
  int64_t n = held_in(fixed) + held_in(bytes);
  for (const AlignedVector<float>* v : {&x, &y, &lut, &beside}) n += capacity_bytes(*v);
  for (const std::vector<float>* v : {&inner, &outer, &from_, &to_, &factor_}) n += capacity_bytes(*v);
  return n;
}

void HeadQueries::prepare(const TiledCall& call, int head, ConstMatrix q, KeyScan kind) {
  const float scale = call.cache.shape().score_scale;
  x.resize(at(call.rows * call.d));
  const int64_t span = call.group * call.d;
  for (int64_t i = 0; i < call.queries; ++i) {
    const float* from = q.row(i) + head * span;
    for (int64_t j = 0; j < span; ++j) x[at(i * span + j)] = from[j] * scale;
  }
  y_width = y_stride = 0;
  inner.clear();
  outer.clear();
  from_.clear();
  token_scale = false;
  if (call.coded_unit(head, Role::kKey) < 0) return;
  const TileDecoder& decoder = call.decoder(head, Role::kKey);
  if (!decoder.folded() && kind == KeyScan::kNone) return;
  y_width = decoder.code_width();
  y_stride = padded(y_width);
  token_scale = decoder.has_token_scale();
  y.resize(at(call.rows * y_stride));
  const CodedQueries coded = call.coded_queries(head);
  if (coded.exact())
    decoder.map().fold(x.data(), call.d, y.data(), y_stride, call.rows);
  else
    for (int64_t r = 0; r < call.rows; ++r) {
      float* to = y.data() + r * y_stride;
      coded.in_codes(q.row(r / call.group) + head * span + r % call.group * call.d, to);
      for (int64_t c = 0; c < y_width; ++c) to[c] *= scale;  // rounded before, as a query comes
      std::fill(to + y_width, to + y_stride, 0.0f);
    }
  const auto project = [&](const std::vector<float>& bias, std::vector<float>& out) {
    out.assign(at(call.rows), 0.0f);
    if (bias.empty()) return;
    for (int64_t r = 0; r < call.rows; ++r)
      for (int64_t c = 0; c < call.d; ++c) out[at(r)] += x[at(r * call.d + c)] * bias[at(c)];
  };
  project(decoder.inner_bias(), inner);
  project(decoder.outer_bias(), outer);
  if (kind != KeyScan::kNone && !decoder.pairs() && !decoder.only_levels()) build_tables(call, decoder, kind);
}

void HeadQueries::build_tables(const TiledCall& call, const TileDecoder& decoder, KeyScan kind) {
  slots = static_cast<int64_t>(decoder.code_slots().size());
  int64_t entries = 0;
  for (const TileDecoder::CodeSlot& s : decoder.code_slots()) entries = std::max<int64_t>(entries, s.entries);
  lut_stride = padded(entries);
  lanes = lanes_for(call.rows);
  lut.assign(at(round_up(call.rows, lanes) * slots * lut_stride), 0.0f);
  AlignedVector<float> words, part;
  const auto tables = static_cast<int64_t>(decoder.slots().size());
  for (int64_t i = 0; i < tables; ++i) {
    const TileDecoder::Slot& s = decoder.slots()[at(i)];
    words.assign(at(s.width * lut_stride), 0.0f);
    const float* queries = y.data() + s.begin;
    int64_t stride = y_stride;
    if (s.contiguous) {
      kernels::transpose(s.words, s.stride, s.entries, s.width, words.data(), lut_stride, false);
    } else {
      part.resize(at(call.rows * s.width));
      for (int c = 0; c < s.width; ++c) {
        for (int e = 0; e < s.entries; ++e)
          words[at(c * lut_stride + e)] = s.words[int64_t{e} * s.stride + s.element[at(c)]];
        for (int64_t r = 0; r < call.rows; ++r) part[at(r * s.width + c)] = y[at(r * y_stride + s.channel[at(c)])];
      }
      queries = part.data();
      stride = s.width;
    }
    kernels::multiply(queries, stride, words.data(), lut_stride, lut.data() + i * lut_stride, slots * lut_stride,
                      call.rows, s.width, lut_stride, false);
  }
  float* sums = lut.data() + tables * lut_stride;
  for (const TileDecoder::Signs& s : decoder.signs()) {
    // The query once against every row of the projection; an entry is a sum of eight of those with their signs.
    const int64_t n = padded(s.term.rows);
    words.assign(at(s.width * n), 0.0f);
    part.resize(at(call.rows * n));
    kernels::transpose(s.words, s.stride, s.term.rows, s.width, words.data(), n, false);
    kernels::multiply(y.data() + s.channel, y_stride, words.data(), n, part.data(), n, call.rows, s.width, n, false);
    for (int64_t r = 0; r < call.rows; ++r)
      for (int64_t i = 0; i < s.term.slots(); ++i)
        sum_signs(part.data() + r * n + 8 * i, s.term.factor, sums + (r * slots + i) * lut_stride);
    sums += s.term.slots() * lut_stride;
  }
  fixed.clear();
  bytes.clear();
  bool wide = true;
  if (scan::fixed_pays(entries) && slots <= scan::kMaxSlots) {
    wide = token_scale;  // scales may still put any row's error beyond its limit
    fixed.resize(at(call.rows));
    if (kind == KeyScan::kBytes) bytes.resize(at(call.rows));
    for (int64_t r = 0; r < call.rows; ++r) {
      const float* row = lut.data() + r * slots * lut_stride;
      if (!all_finite(y.data() + r * y_stride, y_width)) {  // integers would make numbers of it
        fixed[at(r)].bound = std::numeric_limits<float>::infinity();
        if (kind == KeyScan::kBytes) bytes[at(r)].bound = std::numeric_limits<float>::infinity();
        wide = true;
        continue;
      }
      if (kind == KeyScan::kBytes) scan::quantize(row, slots, entries, lut_stride, bytes[at(r)]);
      // 16 bits are for rows that bytes may not serve; only a token scale can still change that.
      const bool served = kind == KeyScan::kBytes && !token_scale && bytes[at(r)].bound <= scan::kByteScanLimit;
      if (served) continue;
      scan::quantize(row, slots, entries, lut_stride, fixed[at(r)]);
      wide = wide || !(fixed[at(r)].bound <= scan::kScanLimit);
    }
  }
  beside.clear();
  if (!wide) return;
  beside.resize(lut.size());
  const int64_t each = slots * lut_stride;
  for (int64_t r = 0; r < call.rows; r += lanes)
    kernels::transpose(lut.data() + r * each, each, lanes, each, beside.data() + r * each, lanes, false);
}

void HeadQueries::unfold_scores(int64_t row, const float* scale, int64_t begin, int64_t end, float* line) const {
  const float in = inner[at(row)], out = outer[at(row)];
  if (token_scale)
    for (int64_t t = begin; t < end; ++t) line[t] = (line[t] + in) * scale[t] + out;
  else
    for (int64_t t = begin; t < end; ++t) line[t] = line[t] + in + out;
}

void HeadQueries::set_score_map(const TiledCall& call, const ScoreMap& map, const std::vector<ScoreRange>& ranges,
                                int64_t chunks, int64_t kv_heads, int head) {
  from_.clear();
  if (map.kind == ScoreMap::Kind::kNone) return;
  from_.assign(at(call.rows), 0.0f);
  to_.assign(at(call.rows), 0.0f);
  factor_.assign(at(call.rows), 1.0f);
  for (int64_t r = 0; r < call.rows; ++r) {
    float low = -kNegativeInfinity, high = kNegativeInfinity;
    for (int64_t c = 0; c < chunks; ++c) {
      low = std::min(low, ranges[at(c * kv_heads + head)].low[at(r)]);
      high = std::max(high, ranges[at(c * kv_heads + head)].high[at(r)]);
    }
    if (!(high > low)) continue;  // nothing coded, or one value: left alone
    from_[at(r)] = low;
    to_[at(r)] = low + map.low_shift;
    factor_[at(r)] = (high - map.high_shift - to_[at(r)]) / (high - low);
  }
}

void HeadQueries::map_scores(int64_t row, int64_t begin, int64_t end, float* line) const {
  if (from_.empty()) return;
  for (int64_t t = begin; t < end; ++t)
    if (line[t] != kNegativeInfinity) line[t] = to_[at(row)] + (line[t] - from_[at(row)]) * factor_[at(row)];
}

}  // namespace vqkv
