// A codec behind a chain of transforms. Encoding runs the transforms; decoding is one plan, into which all of them
// fold.
#include <fmt/format.h>

#include <algorithm>

#include "codec/transform/transform.h"
#include "core/clock.h"
#include "core/error.h"
#include "core/thread_pool.h"

namespace vqkv {
namespace {

// x = y * map + bias
struct Affine {
  LinearMap map;
  std::vector<float> bias;
};

// What one prompt fitted.
struct State final : SequenceState {
  std::vector<std::unique_ptr<Transform>> transforms;  // in place of the chain's; null: as trained
  std::unique_ptr<SequenceState> inner;
  int64_t bytes() const override {
    int64_t all = inner ? inner->bytes() : 0;
    for (const auto& t : transforms) all += t ? t->fitted_bytes() : 0;
    return all;
  }
};
const State* state_of(const SequenceState* state) { return static_cast<const State*>(state); }
const SequenceState* inner_state(const State* state) { return state ? state->inner.get() : nullptr; }

std::vector<float> sum_of(const std::vector<float>& a, const std::vector<float>& b) {
  if (a.empty()) return b;
  if (b.empty()) return a;
  std::vector<float> out(a.size());
  for (size_t i = 0; i < a.size(); ++i) out[i] = a[i] + b[i];
  return out;
}

// rows (n, channels) of a (possibly block-diagonal) product with `m` transposed: row' = row * m^T, m (out, channels).
Matrix<float> times_transposed(ConstMatrix rows, const std::vector<double>& m, int out) {
  const auto width = static_cast<size_t>(out);
  std::vector<double> columns(m.size());  // m turned, so that the sums of a row lie side by side
  for (size_t i = 0; i < width; ++i)
    for (int64_t c = 0; c < rows.cols; ++c)
      columns[static_cast<size_t>(c) * width + i] = m[i * static_cast<size_t>(rows.cols) + static_cast<size_t>(c)];
  Matrix<float> result(rows.rows, out);
  constexpr int64_t kRows = 64;
  parallel_for((rows.rows + kRows - 1) / kRows, [&](int64_t task) {
    std::vector<double> sum(width);
    for (int64_t r = task * kRows; r < std::min(rows.rows, (task + 1) * kRows); ++r) {
      std::fill(sum.begin(), sum.end(), 0.0);
      for (int64_t c = 0; c < rows.cols; ++c) {
        const double x = rows(r, c);
        const double* column = columns.data() + static_cast<size_t>(c) * width;
        for (size_t i = 0; i < width; ++i) sum[i] += x * column[i];
      }
      for (int i = 0; i < out; ++i) result(r, i) = static_cast<float>(sum[static_cast<size_t>(i)]);
    }
  });
  return result;
}

// What a chain carries from one transform to the next: the set as the next one sees it.
struct Carried {
  TrainSet set;
  Matrix<float> x, queries, moment, output_weight;
  std::vector<float> pair_moment;
};

// `unit` becomes `next` behind the transform whose decode side is `back`.
void carry_metric(Carried& c, const Affine& back, const UnitShape& unit, const UnitShape& next) {
  if (is_identity(back.map)) return;
  const int channels = unit.channels(), coded = next.channels();
  // k = k' M + b, so q.k = (q M^T).k' + q.b: queries and moments go through M.
  const std::vector<double> m = dense_of(back.map, coded, channels);
  if (c.set.queries.rows > 0) {
    c.queries = times_transposed(c.set.queries, m, coded);
    c.set.queries = c.queries;
  }
  Matrix<float> metric;
  if (unit.rope == RopePlacement::kPre && !c.set.query_pair_moment.empty()) {
    // Pre-RoPE the metric is a weight a pair; under a diagonal map it stays one.
    if (const auto* scale = std::get_if<DiagonalMap>(&back.map)) {
      std::vector<float> pairs(c.set.query_pair_moment.begin(), c.set.query_pair_moment.end());
      for (size_t p = 0; p < pairs.size(); ++p) {
        const auto [a, b] = unit.pair(static_cast<int>(p));
        const double da = scale->factor[static_cast<size_t>(a)], db = scale->factor[static_cast<size_t>(b)];
        pairs[p] = static_cast<float>(pairs[p] * 0.5 * (da * da + db * db));
      }
      c.pair_moment = std::move(pairs);
      c.set.query_pair_moment = c.pair_moment;
      c.set.query_moment = {};
      return;
    }
    metric = Matrix<float>(channels, channels);
    for (size_t p = 0; p < c.set.query_pair_moment.size(); ++p) {
      const auto [a, b] = unit.pair(static_cast<int>(p));
      metric(a, a) = metric(b, b) = 0.5f * c.set.query_pair_moment[p];
    }
    c.set.query_pair_moment = {};
  } else if (c.set.query_moment.rows > 0) {
    metric = Matrix<float>(channels, channels);
    for (int i = 0; i < channels; ++i) std::copy_n(c.set.query_moment.row(i), channels, metric.row(i));
  } else {
    return;
  }
  // M S M^T
  const Matrix<float> right = times_transposed(metric, m, coded);
  Matrix<float> left(coded, coded);
  for (int i = 0; i < coded; ++i)
    for (int j = 0; j < coded; ++j) {
      double sum = 0;
      for (int l = 0; l < channels; ++l) sum += m[static_cast<size_t>(i * channels + l)] * right(l, j);
      left(i, j) = static_cast<float>(sum);
    }
  c.moment = std::move(left);
  c.set.query_moment = c.moment;
}

// W v = (W M_h^T) v' + ...: each query head's slice goes through the block of its KV head. A map that mixes heads
// leaves no such slices.
void carry_output_weight(Carried& c, const Affine& back, const Transform& t, const UnitShape& unit,
                         const UnitShape& next) {
  if (c.set.output_weight.rows == 0 || is_identity(back.map)) return;
  const int d = unit.head_dim, coded = next.head_dim;
  if (next.heads != unit.heads || coded % t.mixed_channels() != 0) {
    c.set.output_weight = {};
    return;
  }
  const std::vector<double> m = dense_of(back.map, next.channels(), unit.channels());
  const int64_t slices = c.set.output_weight.cols / d;
  const int64_t group = slices / unit.heads;
  Matrix<float> out(c.set.output_weight.rows, slices * coded);
  parallel_for(out.rows, [&](int64_t r) {
    for (int64_t s = 0; s < slices; ++s) {
      const int64_t head = s / group;
      for (int i = 0; i < coded; ++i) {
        double sum = 0;
        for (int j = 0; j < d; ++j)
          sum += c.set.output_weight(r, s * d + j) *
                 m[static_cast<size_t>((head * coded + i) * unit.channels() + head * d + j)];
        out(r, s * coded + i) = static_cast<float>(sum);
      }
    }
  });
  c.output_weight = std::move(out);
  c.set.output_weight = c.output_weight;
}

class ChainCodec final : public Codec {
 public:
  ChainCodec(std::vector<std::unique_ptr<Transform>> chain, std::unique_ptr<Codec> inner, const UnitShape& unit)
      : chain_(std::move(chain)), inner_(std::move(inner)), units_{unit}, layout_(inner_->layout()) {
    for (size_t i = 0; i < chain_.size(); ++i) {
      units_.push_back(chain_[i]->coded(units_[i]));
      if (!chain_[i]->is_token_scale()) continue;
      VQKV_CHECK(scale_at_ < 0);
      scale_at_ = static_cast<int>(i);
      layout_.sides.push_back({"token_scale", chain_[i]->scale_type(), chain_[i]->scale_groups(), true});
    }
    VQKV_CHECK(inner_->channels() == units_.back().channels());
  }

  int channels() const override { return units_[0].channels(); }
  const CodeLayout& layout() const override { return layout_; }
  RopePlacement rope() const override { return inner_->rope(); }
  QueryForm query_form() const override { return inner_->query_form(); }
  int levels() const override { return inner_->levels(); }
  CodeLayout level_layout(int level) const override {
    CodeLayout out = layout_;
    out.fields = inner_->level_layout(level).fields;
    return out;
  }

  TrainReport train(const TrainSet& set, const Rng& rng) override {
    const Stopwatch watch;
    Carried c;
    c.set = set;
    c.set.squared_gradient = {};
    State as_prompt;
    for (size_t i = 0; i < chain_.size(); ++i) {
      chain_[i]->train(c.set, rng.split(1000 + i));
      // What stands behind a transform of prompts learns on the rows as if they were one, without its queries.
      as_prompt.transforms.push_back(
          chain_[i]->fit_needs().tokens > 0 && c.set.x.rows > 0 ? chain_[i]->fit(c.set.x, ConstMatrix()) : nullptr);
      Matrix<float> next(c.set.x.rows, units_[i + 1].channels());
      step(i, c.set.x, next, nullptr, &as_prompt);
      c.x = std::move(next);
      c.set.x = c.x;
      c.set.head_dim = units_[i + 1].head_dim;
      c.set.heads = units_[i + 1].heads;
      if (static_cast<int>(i) == scale_at_) continue;
      const Affine back = inverse_of(i, &as_prompt);
      if (units_[i].role == Role::kKey)
        carry_metric(c, back, units_[i], units_[i + 1]);
      else
        carry_output_weight(c, back, *chain_[i], units_[i], units_[i + 1]);
    }
    TrainReport report = inner_->train(c.set, rng);
    report.seconds = watch.seconds();
    return report;
  }

  FitNeeds fit_needs() const override {
    FitNeeds needs = inner_->fit_needs();
    for (const auto& t : chain_) {
      needs.tokens = std::max(needs.tokens, t->fit_needs().tokens);
      needs.queries = needs.queries || t->fit_needs().queries;
    }
    return needs;
  }
  std::unique_ptr<SequenceState> fit(ConstMatrix k, ConstMatrix v, ConstMatrix q) const override {
    const bool key = units_[0].role == Role::kKey;
    auto state = std::make_unique<State>();
    ConstMatrix rows = key ? k : v, queries = q;
    Matrix<float> own, turned;
    bool fits = false;
    for (size_t i = 0; i < chain_.size(); ++i) {
      const FitNeeds needs = chain_[i]->fit_needs();
      state->transforms.push_back(
          needs.tokens > 0 ? chain_[i]->fit(rows, key && needs.queries ? queries : ConstMatrix()) : nullptr);
      fits = fits || state->transforms[i];
      Matrix<float> next(rows.rows, units_[i + 1].channels());
      step(i, rows, next, nullptr, state.get());
      own = std::move(next);
      rows = own;
      if (!key || queries.rows == 0 || static_cast<int>(i) == scale_at_) continue;
      const Affine back = inverse_of(i, state.get());
      const int to = units_[i + 1].channels();
      if (is_identity(back.map)) continue;
      turned = times_transposed(queries, dense_of(back.map, to, units_[i].channels()), to);
      queries = turned;
    }
    if (key && !inner_->fit_needs().queries) queries = {};
    state->inner = inner_->fit(key ? rows : k, key ? v : rows, queries);
    if (!fits && !state->inner) return nullptr;
    return state;
  }

  void encode(ConstMatrix x, CodeBlock& out, const SequenceState* given) const override {
    const State* state = state_of(given);
    encode_behind(x, out, state, [&](ConstMatrix y) { inner_->encode(y, out, inner_state(state)); });
  }
  void encode_at(ConstMatrix x, const EncodeContext& at, CodeBlock& out, const SequenceState* given) const override {
    const State* state = state_of(given);
    encode_behind(x, out, state, [&](ConstMatrix y) { inner_->encode_at(y, at, out, inner_state(state)); });
  }
  template <class Encode>
  void encode_behind(ConstMatrix x, CodeBlock& out, const State* state, Encode&& encode_inner) const {
    check_encode_input(*this, x);
    std::vector<float> scales;
    const Matrix<float> y = forward(x, &scales, state);
    encode_inner(y);
    if (scale_at_ >= 0) out.sides.push_back(std::move(scales));
    for (OverlayEntry& e : out.overlay) undo(e, state);
  }

  DecodePlan plan(const PlanQuery& query) const override {
    const State* state = state_of(query.state);
    DecodePlan plan = inner_->plan({query.level, inner_state(state)});
    const int n = channels(), coded = plan.code_channels;
    // Channels that the inner codec decodes, and those that a token scale of the chain multiplies.
    const int decoded = plan.channels, scaled = units_[scale_at_ < 0 ? 0 : static_cast<size_t>(scale_at_)].channels();
    // Behind the inner codec: x' = outer + s (inner_bias + y map). A chain's own token scale splits its maps in two.
    Affine inside, outside;
    for (size_t i = chain_.size(); i-- > 0;) {
      if (static_cast<int>(i) == scale_at_) continue;
      const Affine back = inverse_of(i, state);
      Affine& part = static_cast<int>(i) < scale_at_ ? outside : inside;
      const int from = units_[i + 1].channels(), to = units_[i].channels();
      if (!part.bias.empty()) part.bias = apply(back.map, part.bias, to);
      part.bias = sum_of(part.bias, back.bias);
      part.map = compose(part.map, back.map, &part == &inside ? decoded : scaled, from, to);
    }
    if (plan.token_scale_side < 0) {
      plan.inner_bias = sum_of(plan.inner_bias, plan.outer_bias);
      plan.outer_bias.clear();
      if (scale_at_ < 0) std::swap(plan.inner_bias, plan.outer_bias);
    } else if (scale_at_ >= 0) {
      fail_usage("a codec with a token scale of its own can't stand behind the token_scale transform");
    }
    if (!plan.inner_bias.empty()) plan.inner_bias = apply(inside.map, plan.inner_bias, scaled);
    if (!plan.outer_bias.empty()) plan.outer_bias = apply(inside.map, plan.outer_bias, scaled);
    (scale_at_ >= 0 ? plan.inner_bias : plan.outer_bias) =
        sum_of(scale_at_ >= 0 ? plan.inner_bias : plan.outer_bias, inside.bias);
    plan.map = compose(plan.map, inside.map, coded, decoded, scaled);
    if (scale_at_ >= 0) {
      if (!plan.inner_bias.empty()) plan.inner_bias = apply(outside.map, plan.inner_bias, n);
      plan.outer_bias = outside.bias;
      plan.map = compose(plan.map, outside.map, coded, scaled, n);
      plan.token_scale_side = static_cast<int>(layout_.sides.size()) - 1;
    }
    plan.channels = n;
    plan.layout = layout_;
    plan.constants_as = DType::kF32;  // products are exact in no narrower type
    return plan;
  }

  using Codec::constant_bytes;
  int64_t constant_bytes(CountedBooks& counted) const override {
    int64_t bytes = 0;
    for (const auto& t : chain_) bytes += t->encoder_bytes();
    if (fit_needs().tokens > 0) {
      // The maps become one with what a prompt fits; before that each is kept by itself.
      for (size_t i = 0; i < chain_.size(); ++i) {
        if (static_cast<int>(i) == scale_at_ || chain_[i]->fit_needs().tokens > 0) continue;
        const Affine back = inverse_of(i, nullptr);
        bytes += stored_bytes(back.map) + static_cast<int64_t>(back.bias.size() * sizeof(float));
      }
      return bytes + inner_->constant_bytes(counted);
    }
    CountedBooks inner;
    bytes += plan({}).constant_bytes(counted) + inner_->constant_bytes();
    return bytes - inner_->plan().constant_bytes(inner);
  }

  void save(ParameterWriter& out) const override {
    for (size_t i = 0; i < chain_.size(); ++i) chain_[i]->save(out, prefix(i));
    inner_->save(out);
  }
  void load(const ParameterReader& in) override {
    for (size_t i = 0; i < chain_.size(); ++i) chain_[i]->load(in, prefix(i));
    inner_->load(in);
  }

 private:
  static std::string prefix(size_t i) { return fmt::format("transform.{}.", i); }

  const Transform& transform(size_t i, const State* state) const {
    return state && state->transforms[i] ? *state->transforms[i] : *chain_[i];
  }

  Affine inverse_of(size_t i, const State* state) const {
    Affine a;
    transform(i, state).inverse(a.map, a.bias);
    return a;
  }

  // x -> y through transform i; the rounded token scales go to `kept` where asked for.
  void step(size_t i, ConstMatrix x, MutMatrix y, std::vector<float>* kept, const State* state) const {
    const Transform& t = transform(i, state);
    if (static_cast<int>(i) != scale_at_) {
      t.forward(x, y);
      return;
    }
    const int groups = t.scale_groups();
    const int64_t width = x.cols / groups;
    Matrix<float> scales(x.rows, groups);
    t.scales(x, scales);
    for (int64_t r = 0; r < x.rows; ++r)
      for (int g = 0; g < groups; ++g) {
        float& s = scales(r, g);
        s = round_scale(t.scale_type(), s);
        for (int64_t c = g * width; c < (g + 1) * width; ++c) y(r, c) = x(r, c) / s;
      }
    if (kept) kept->assign(scales.storage.begin(), scales.storage.end());
  }

  Matrix<float> forward(ConstMatrix x, std::vector<float>* scales, const State* state) const {
    Matrix<float> now, next;
    for (size_t i = 0; i < chain_.size(); ++i) {
      next = Matrix<float>(x.rows, units_[i + 1].channels());
      step(i, i == 0 ? x : ConstMatrix(now), next, scales, state);
      std::swap(now, next);
    }
    return now;
  }

  // Exact exceptions are stated where the codec's input lives. with_transforms refused chains that mix channels.
  void undo(OverlayEntry& e, const State* state) const {
    for (size_t i = chain_.size(); i-- > 0;) {
      const Affine back = inverse_of(i, state);
      if (const auto* scale = std::get_if<DiagonalMap>(&back.map))
        e.value *= scale->factor[static_cast<size_t>(e.channel)];
      if (!e.add && !back.bias.empty()) e.value += back.bias[static_cast<size_t>(e.channel)];
    }
    e.value = round_side(DType::kF16, e.value);  // as it is stored
  }

  std::vector<std::unique_ptr<Transform>> chain_;
  std::unique_ptr<Codec> inner_;
  std::vector<UnitShape> units_;  // as each transform sees it, and last as the inner codec does
  CodeLayout layout_;
  int scale_at_ = -1;  // index of the token scale, or none
};

}  // namespace

std::unique_ptr<Codec> with_transforms(std::vector<std::unique_ptr<Transform>> chain, std::unique_ptr<Codec> inner,
                                       const UnitShape& unit) {
  if (chain.empty()) return inner;
  ChainShape behind{unit};
  for (const auto& t : chain) behind.follow(*t);
  const std::string reason = check_inner(behind, unit, *inner);
  if (!reason.empty()) fail_usage(reason);
  return std::make_unique<ChainCodec>(std::move(chain), std::move(inner), unit);
}

std::string check_inner(const ChainShape& behind, const UnitShape& unit, const Codec& inner) {
  if (inner.sees_lower())
    return "this codec sees the decoded rows of the layer below, which no transform has gone over; drop the transforms";
  const bool narrow = behind.unit.channels() != unit.channels();
  if (inner.layout().overlay && (behind.mixed > 1 || behind.scaled || narrow))
    return "exact exceptions of this codec can't stand behind a transform that mixes or drops channels or scales "
           "tokens";
  if (inner.query_form() != QueryForm::kExact && !behind.rotated)
    return "queries are rounded as llama.cpp does (query), which rotates by one Hadamard matrix and transforms nothing "
           "else; drop the other transforms or the rounding";
  for (const SideSpec& s : inner.layout().sides) {
    if (s.name != "token_scale") continue;
    if (behind.scaled) return "this codec scales tokens itself; drop the token_scale transform";
    if ((inner.channels() / s.slots) % behind.mixed != 0)
      return "this codec's token scales cover fewer channels than the transforms mix";
  }
  return "";
}

}  // namespace vqkv
