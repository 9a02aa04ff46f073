// The content of the kept files, by a formula that tests can say again: integers of 7 bits and a sign over 32, exact
// in bf16, f16 and f32. It describes files that are already kept, so it never changes.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cache/cache.h"
#include "codec/codec_set.h"
#include "io/trace.h"

namespace vqkv::kept {

enum What : uint64_t { kKey = 0, kValue = 1, kQuery = 2, kOutputWeight = 3, kMass = 4 };

inline float value_at(What what, int64_t layer, int64_t head, int64_t row, int64_t channel) {
  uint64_t z = what * 0x9e3779b97f4a7c15u;
  for (const int64_t part : {layer, head, row, channel}) {
    z = (z ^ static_cast<uint64_t>(part)) * 0xbf58476d1ce4e5b9u;
    z ^= z >> 29;
  }
  return static_cast<float>(static_cast<int64_t>(z % 255) - 127) / 32;
}

// One layer (the model's fifth), 2 KV heads of 16 channels, 4 query heads; document 0 in windows of 40 and 24 tokens,
// document 1 in one of 64.
inline TraceInfo info() {
  TraceInfo i;
  i.shape.layers = 1;
  i.shape.kv_heads = 2;
  i.shape.q_heads = 4;
  i.shape.head_dim = 16;
  i.shape.rope = RopeFacts::plain(16, 16, 10000.0);
  i.shape.score_scale = 0.25f;
  i.hidden = 6;
  i.stored = DType::kBF16;
  i.layer_index = {5};
  i.model_name = "kept";
  i.model_hash = std::string(64, 'c');
  i.model = {{"architecture", "synthetic"}};
  i.provenance = {{"tool", "make_kept"}};
  return i;
}

struct Window {
  int32_t document;
  int64_t tokens;
  std::vector<int32_t> queries;
};
inline const std::vector<Window>& windows() {
  static const std::vector<Window> all{{0, 40, {0, 39}}, {0, 24, {3, 23}}, {1, 64, {0, 31, 63}}};
  return all;
}

// What a unit of a kept codec codes: (max(4, tokens of a block), channels).
inline Matrix<float> rows_of(const TrainedUnit& u) {
  const UnitShape& shape = u.spec.unit;
  Matrix<float> x(std::max(4, u.codec->layout().block_tokens), shape.channels());
  const auto what = shape.role == Role::kKey ? kKey : kValue;
  for (int64_t r = 0; r < x.rows; ++r)
    for (int64_t c = 0; c < x.cols; ++c) x(r, c) = value_at(what, 0, shape.first_head + c / 16, r, c % 16);
  return x;
}
// Of a codec that fits parameters to its prompt, with these rows for one; null for others.
inline std::unique_ptr<SequenceState> state_of(const Codec& codec, ConstMatrix x) {
  return codec.fit_needs().tokens > 0 ? codec.fit(x, x, {}) : nullptr;
}

// What a sequence of 512 tokens of a kept codec set costs, 1.5 exact exceptions a token where it has any.
inline Json ledger_of(const CodecSet& set) {
  std::vector<UnitExtras> extras;
  for (const TrainedUnit& u : set.units()) {
    UnitExtras& e = extras.emplace_back();
    if (u.codec->layout().overlay) e.exceptions = 1.5;
    if (const auto state = state_of(*u.codec, rows_of(u))) {
      e.state_bytes = state->bytes();
      e.form_bytes = fitted_form_bytes(*u.codec, u.spec.unit, *state);
    }
  }
  const Json cache = canonical_cache_config({{"sinks", 4}, {"window", 32}, {"flush", 16}});
  return ledger_at(set, CachePolicy::from_json(cache), 512, extras).to_json();
}

inline double moment_at(int document, int head, int row, int column) {
  if (row != column) return row - column == 1 || column - row == 1 ? 0.125 : 0.0;
  return 1.0 + document + head / 2.0 + row / 4.0;
}

// Writes it with this build's writer.
inline std::string write_trace(const std::string& path) {
  TraceWriter writer(path, info(), {"first.txt", "second.txt"}, 128, 7);
  int64_t first_token = 0, first_query = 0;
  for (const Window& window : windows()) {
    TraceWindowData w;
    w.document = window.document;
    w.query_token = window.queries;
    const auto rows = [&](What what, int64_t n, int64_t heads, int64_t first) {
      Matrix<float> m(n, heads * 16);
      for (int64_t r = 0; r < n; ++r)
        for (int64_t c = 0; c < heads * 16; ++c) m(r, c) = value_at(what, 0, c / 16, first + r, c % 16);
      return m;
    };
    for (int64_t t = 0; t < window.tokens; ++t) {
      w.token_id.push_back(static_cast<int32_t>(first_token + t) * 7 % 100);
      w.position.push_back(static_cast<int32_t>(t));
    }
    const auto queries = static_cast<int64_t>(window.queries.size());
    w.key.push_back(rows(kKey, window.tokens, 2, first_token));
    w.value.push_back(rows(kValue, window.tokens, 2, first_token));
    w.query.push_back(rows(kQuery, queries, 4, first_query));
    std::vector<double> moment, pairs;
    for (int h = 0; h < 2; ++h) {
      // Document 0 comes in two windows, whose halves add up to moment_at.
      const double part = window.document == 0 ? 0.5 : 1.0;
      for (int a = 0; a < 16; ++a)
        for (int b = 0; b < 16; ++b) moment.push_back(part * moment_at(window.document, h, a, b));
      for (int p = 0; p < 8; ++p) pairs.push_back(part * (p + h));
    }
    w.query_moment.push_back(moment);
    w.query_pair_moment.push_back(pairs);
    std::vector<float> mass;
    for (int64_t h = 0; h < 2; ++h)
      for (int64_t t = 0; t < window.tokens; ++t) {
        const float v = value_at(kMass, 0, h, first_token + t, 0);
        mass.push_back(v * v);
      }
    w.received_mass.push_back(mass);
    for (float& v : mass) v /= 2;
    w.received_mass2.push_back(mass);
    writer.add(w);
    first_token += window.tokens;
    first_query += queries;
  }
  Matrix<float> output(6, 64);
  for (int64_t r = 0; r < 6; ++r)
    for (int64_t c = 0; c < 64; ++c) output(r, c) = value_at(kOutputWeight, 0, 0, r, c);
  writer.output_weight(0, output);
  writer.finish();
  return TraceReader(path).info().content_hash;
}

}  // namespace vqkv::kept
