#include "experiment/shape_ledger.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "cache/keep_rule.h"
#include "core/error.h"
#include "core/json.h"
#include "core/rng.h"

namespace vqkv {
namespace {

// A codec before it has learned anything, as far as a ledger asks for it. Its books are not there to be counted.
class Unlearned final : public Codec {
 public:
  explicit Unlearned(std::unique_ptr<Codec> codec) : codec_(std::move(codec)) {}
  int channels() const override { return codec_->channels(); }
  const CodeLayout& layout() const override { return codec_->layout(); }
  RopePlacement rope() const override { return codec_->rope(); }
  FitNeeds fit_needs() const override { return codec_->fit_needs(); }
  bool sees_lower() const override { return codec_->sees_lower(); }
  int levels() const override { return codec_->levels(); }
  CodeLayout level_layout(int level) const override { return codec_->level_layout(level); }
  using Codec::constant_bytes;
  int64_t constant_bytes(CountedBooks&) const override { return 0; }

  TrainReport train(const TrainSet&, const Rng&) override { refuse(); }
  void encode(ConstMatrix, CodeBlock&, const SequenceState*) const override { refuse(); }
  DecodePlan plan(const PlanQuery&) const override { refuse(); }
  void save(ParameterWriter&) const override { refuse(); }
  void load(const ParameterReader&) override { refuse(); }

 private:
  [[noreturn]] static void refuse() { throw Error(ErrorKind::kInternal, "a codec that never learned can't code"); }
  std::unique_ptr<Codec> codec_;
};

// What a prompt's parameters take, whatever the prompt: fitted to noise.
UnitExtras fitted_extras(const Codec& codec, const UnitShape& unit, int group) {
  const FitNeeds needs = codec.fit_needs();
  if (needs.tokens == 0) return {};
  const int64_t tokens = std::max<int64_t>(needs.tokens, 64);
  Rng rng(1);
  const auto noise = [&](int64_t rows) {
    Matrix<float> x(rows, unit.channels());
    for (float& v : x.storage) v = static_cast<float>(rng.normal());
    return x;
  };
  const Matrix<float> k = noise(tokens), v = noise(tokens), q = noise(needs.queries ? tokens * group : 0);
  const auto state = codec.fit(k, v, q);
  VQKV_CHECK(state != nullptr);
  return {.state_bytes = state->bytes(), .form_bytes = fitted_form_bytes(codec, unit, *state)};
}

}  // namespace

ShapeLedger::ShapeLedger(const Json& codec, const Json& cache, const CacheShape& shape, double exceptions) {
  const CodecPlan plan = resolve_codec(codec, shape);
  if (!plan.skip.empty()) fail_usage(plan.skip);
  if (!plan.tiers.empty()) fail_usage("codec.tiers: bits of tiers are those of a mix; `vqkv-sweep` counts them");
  const Json published = cache.is_null() ? preset_cache_config(codec) : cache;
  policy_ = CachePolicy::from_json(canonical_cache_config(published.is_null() ? Json::object() : published));
  if (const std::string reason = cache_conflict(policy_, plan); !reason.empty()) fail_usage(reason);

  std::vector<TrainedUnit> units;
  std::vector<size_t> made;  // the first unit of each codec
  for (const UnitSpec& spec : plan.units) {
    const auto same = std::ranges::find_if(made, [&](size_t u) { return units[u].spec.same_codec(spec); });
    if (same != made.end()) {
      units.push_back({spec, units[*same].codec, {}});
      extras_.push_back(extras_[*same]);
      continue;
    }
    auto real = make_codec(spec);
    UnitExtras extras = fitted_extras(*real, spec.unit, shape.group());
    if (real->layout().overlay) extras.exceptions = exceptions * spec.unit.channels();
    made.push_back(units.size());
    units.push_back({spec, std::make_shared<const Unlearned>(std::move(real)), {}});
    extras_.push_back(extras);
  }
  codecs_ = std::make_shared<const CodecSet>(shape, plan.config, std::move(units), "");
}

double ShapeLedger::bits(std::optional<Role> role, int64_t tokens, int level) const {
  double bits = 0;
  int64_t channels = 0;
  for (size_t i = 0; i < codecs_->units().size(); ++i) {
    const TrainedUnit& u = codecs_->units()[i];
    if (role && u.spec.unit.role != *role) continue;
    const CodeLayout layout = level < 0 ? u.codec->layout() : u.codec->level_layout(level);
    bits += layout.bits_per_token() + layout.overlay_bits_per_token(extras_[i].exceptions);
    if (tokens > 0) bits += 8 * static_cast<double>(extras_[i].state_bytes) / static_cast<double>(tokens);
    channels += u.spec.unit.channels();
  }
  return bits / static_cast<double>(channels);
}

bool ShapeLedger::keeps_exceptions() const {
  return policy_.keeps_codes() &&
         std::ranges::any_of(codecs_->units(), [](const TrainedUnit& u) { return u.codec->layout().overlay; });
}

double ShapeLedger::held(int64_t tokens) const {
  if (policy_.keep) return held_where_decided(tokens);
  const ByteLedger b = at(tokens);
  const CacheShape& s = shape();
  const int64_t values = int64_t{2} * s.layers * s.kv_heads * s.head_dim * tokens;
  return 8 * static_cast<double>(b.codes + b.side + b.overlay + b.sinks + b.window) / static_cast<double>(values);
}

double ShapeLedger::held_where_decided(int64_t tokens) const {
  const int64_t sinks = std::min(policy_.sinks, tokens), kept = std::min(tokens, sinks + policy_.keep->kept(tokens));
  const double whole = 8 * static_cast<double>(dtype_size(policy_.exact_dtype));
  double sum = 0;  // bits of a value of one token, over the kept ones of both roles
  for (const Role role : {Role::kKey, Role::kValue}) {
    const int64_t exact = std::min(kept, tokens - (policy_.coded_among(role, tokens) - sinks));
    sum += whole * static_cast<double>(exact) + bits(role) * static_cast<double>(kept - exact);
  }
  if (policy_.keep->accumulates()) sum += 8 * sizeof(double) * static_cast<double>(kept) / shape().head_dim;
  return sum / static_cast<double>(2 * tokens);
}

double ShapeLedger::held_in_the_mean(int64_t tokens) const {
  const int64_t period = std::lcm(policy_.k.flush, policy_.v.flush);
  const double coded = bits();
  double beyond = 0;  // bits a value times tokens
  for (int64_t t = tokens; t < tokens + period; ++t) beyond += (held(t) - coded) * static_cast<double>(t);
  return coded + beyond / static_cast<double>(period) / static_cast<double>(tokens);
}

}  // namespace vqkv
