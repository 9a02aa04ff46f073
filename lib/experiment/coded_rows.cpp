#include "experiment/coded_rows.h"

#include <fmt/format.h>

#include <algorithm>

#include "cache/cache.h"
#include "cache/coding.h"
#include "core/clock.h"
#include "core/error.h"
#include "core/finite.h"

namespace vqkv {
namespace {

// A window's rows as a cache that replays it holds them exactly.
class WindowRows final : public HeldRows {
 public:
  WindowRows(const TraceRows& rows, const CodecSet& codecs, int layer, const EvalWindow& w, std::span<HeadRows> heads,
             ConstMatrix below)
      : rows_(rows),
        codecs_(codecs),
        policy_(rows.policy(w).for_codecs(codecs)),
        layer_(layer),
        window_(w),
        heads_(heads),
        below_(below),
        before_rope_(heads.size()) {}

  void load(Role role, int head, int64_t first, MutMatrix out) const override {
    const HeadRows& exact = heads_[static_cast<size_t>(head)];
    const Matrix<float>& from = role == Role::kValue ? exact.v : pre(head) ? before_rope(head) : exact.k;
    for (int64_t r = 0; r < out.rows; ++r) {
      std::copy_n(from.row(first + r), out.cols, out.row(r));
      policy_.round_exact(out.row(r), out.cols, [&](int64_t channel) {
        return rows_.place(role, layer_, head, window_.window.first_token + first + r, channel);
      });
    }
  }
  void positions(int64_t first, std::span<int32_t> out) const override {
    std::copy_n(window_.position.begin() + first, out.size(), out.begin());
  }
  void lower(int64_t first, MutMatrix out) const override {
    const int64_t sinks = std::min(policy_.sinks, window_.window.tokens);
    for (int64_t r = 0; r < out.rows; ++r) std::copy_n(below_.row(first - sinks + r), out.cols, out.row(r));
  }
  void queries(int head, MutMatrix out) const override { rows_.first_queries(layer_, head, window_, !pre(head), out); }

 private:
  bool pre(int head) const { return held_rope(codecs_, layer_, head) == RopePlacement::kPre; }
  const Matrix<float>& before_rope(int head) const {
    Matrix<float>& k = before_rope_[static_cast<size_t>(head)];
    if (k.rows == 0) k = rows_.keys(layer_, head, window_);
    return k;
  }

  const TraceRows& rows_;
  const CodecSet& codecs_;
  CachePolicy policy_;
  int layer_;
  const EvalWindow& window_;
  std::span<HeadRows> heads_;
  ConstMatrix below_;
  mutable std::vector<Matrix<float>> before_rope_;  // (heads), read when first asked for
};

}  // namespace

void require_finite(const TraceRows& rows, const UnitShape& u, const EvalWindow& w, int64_t first, ConstMatrix x) {
  for (int64_t t = 0; t < x.rows; ++t)
    if (const int64_t c = first_not_finite(x.row(t), x.cols); c >= 0)
      fail_data(fmt::format("layer {}, role {}, KV head {}, document {}: token {}, channel {} decodes to {}",
                            rows.scope().layers[static_cast<size_t>(u.layer)], role_name(u.role),
                            rows.scope().heads[static_cast<size_t>(u.first_head + c / u.head_dim)], w.window.document,
                            first + t, c % u.head_dim, x(t, c)));
}

void put_decoded(const TraceRows& rows, const TrainedUnit& unit, const EvalWindow& w, ConstMatrix decoded, int head,
                 int64_t first, Matrix<float>& hat) {
  const UnitShape& u = unit.spec.unit;
  for (int64_t r = 0; r < decoded.rows; ++r)
    std::copy_n(decoded.row(r) + head * u.head_dim, u.head_dim, hat.row(first + r));
  if (u.role == Role::kKey && unit.codec->rope() == RopePlacement::kPre && decoded.rows > 0)
    rope_apply(rows.rope(), w.position.data() + first, hat.view().slice_rows(first, decoded.rows));
}

RopePlacement held_rope(const CodecSet& codecs, int layer, int head) {
  return codecs.units()[static_cast<size_t>(codecs.unit_index(layer, head, Role::kKey))].codec->rope();
}

HeadRows exact_rows(const TraceRows& rows, int layer, int head, const EvalWindow& w, RopePlacement held) {
  HeadRows r;
  r.k = rows.keys(layer, head, w);
  if (held == RopePlacement::kPre) rows.check_exact(Role::kKey, layer, head, w, r.k);
  rope_apply(rows.rope(), w.position.data(), r.k);
  if (held == RopePlacement::kPost) rows.check_exact(Role::kKey, layer, head, w, r.k);
  r.v = rows.values(layer, head, w);
  rows.check_exact(Role::kValue, layer, head, w, r.v);
  return r;
}

CodingTotals& CodingTotals::operator+=(const CodingTotals& o) {
  encode += o.encode;
  decode += o.decode;
  values += o.values;
  tokens += o.tokens;
  exceptions += o.exceptions;
  state_bytes += o.state_bytes;
  form_bytes += o.form_bytes;
  return *this;
}

CodingTotals code_unit(const TraceRows& rows, const CodecSet& codecs, const TrainedUnit& unit, const EvalWindow& w,
                       std::span<HeadRows> heads, CodeBlock& block, ConstMatrix lower, Matrix<float>* keep,
                       std::unique_ptr<SequenceState>* keep_state) {
  const UnitShape& u = unit.spec.unit;
  const Codec& codec = *unit.codec;
  const CachePolicy policy = rows.policy(w).for_codecs(codecs);
  const bool key = u.role == Role::kKey;
  const int64_t n = w.window.tokens, sinks = std::min(policy.sinks, n), step = codec.layout().block_tokens;
  const int64_t coded = (policy.coded_at_last(u.role, n) - sinks) / step * step;
  CodingTotals t;
  if (policy.drops) {
    for (int h = 0; h < u.heads; ++h) {
      HeadRows& to = heads[static_cast<size_t>(u.first_head + h)];
      (key ? to.k_hat : to.v_hat) = key ? to.k : to.v;
      (key ? to.coded_k : to.coded_v) = n;
    }
    return t;
  }
  Matrix<float> decoded(coded, u.channels());
  ScoreMap score;
  std::vector<CodedQueries> queries(static_cast<size_t>(u.heads));
  if (coded > 0) {
    const WindowRows exact(rows, codecs, u.layer, w, heads, lower);
    Stopwatch watch;
    auto state = fit_unit(codec, u, codecs.shape().group(), exact, fit_tokens(policy, n), policy.fitted_from);
    const DecodePlan plan = codec.plan({-1, state.get()});
    score = plan.score;
    for (int h = 0; key && h < u.heads; ++h) queries[static_cast<size_t>(h)] = {plan, h, u.head_dim};
    if (state) {
      if (codecs.tiers() > 1) refuse_fitted_tier(unit.spec.method);
      t.state_bytes = state->bytes();
      t.form_bytes = fitted_form_bytes(codec, u, *state);
    }
    block = encode_unit(codec, plan, u, exact, sinks, sinks + coded, state.get());
    t.encode = watch.seconds();
    watch.restart();
    decode_plan(plan, block, decoded, lower.slice_rows(0, lower.rows > 0 ? coded : 0));
    require_finite(rows, u, w, sinks, decoded);
    t.decode = watch.seconds();
    t.values = coded * u.channels();
    t.tokens = coded;
    t.exceptions = static_cast<int64_t>(block.overlay.size());
    if (keep_state) *keep_state = std::move(state);
  }
  for (int h = 0; h < u.heads; ++h) {
    HeadRows& to = heads[static_cast<size_t>(u.first_head + h)];
    Matrix<float>& hat = key ? to.k_hat : to.v_hat;
    hat = key ? to.k : to.v;
    put_decoded(rows, unit, w, decoded, h, sinks, hat);
    if (key) {
      to.score = score;
      to.query = queries[static_cast<size_t>(h)];
    }
    (key ? to.coded_k : to.coded_v) = sinks + coded;
    if (h == 0 && coded > 0) (key ? to.key_block : to.value_block) = &block;
  }
  if (keep) *keep = std::move(decoded);
  return t;
}

}  // namespace vqkv
