// QuantSpec's hierarchical cache: an INT4 code of each value, and a second nibble that codes what the first leaves over
// on a grid 16 times finer. Both together are an INT8 code, 16 upper + lower, so that a draft of 4 bits and its target
// of 8 read one memory.
#include <algorithm>
#include <cmath>

#include "codec/methods/affine.h"
#include "core/error.h"
#include "core/thread_pool.h"

namespace vqkv {
namespace {

struct QuantSpecKnobs {
  int group = 0;
  KnobTable table() {
    return KnobTable().integer("group", &group, 0, 1024,
                               "keys: tokens a scale; values: channels a scale; 0: the channels of a head");
  }
};

int group_of(const QuantSpecKnobs& k, const UnitShape& unit) { return k.group == 0 ? unit.head_dim : k.group; }

constexpr int kNibble = 4, kZero = 8;            // bits; the lower code of a residual of 0
constexpr double kFiner = 1.0 / (1 << kNibble);  // the lower grid's scale against the upper's

class QuantSpecCodec final : public Codec {
 public:
  QuantSpecCodec(const QuantSpecKnobs& k, const UnitShape& unit)
      : upper_(AffineGrid{.bits = kNibble}, {group_of(k, unit), unit.role == Role::kKey}, unit),
        layout_(upper_.layout()),
        group_channels_(unit.role == Role::kKey ? 1 : group_of(k, unit)) {
    layout_.fields[0].name = "upper";
    layout_.fields.push_back({"lower", kNibble, channels(), true});
  }

  int channels() const override { return upper_.channels(); }
  const CodeLayout& layout() const override { return layout_; }
  RopePlacement rope() const override { return upper_.rope(); }
  int levels() const override { return 2; }
  CodeLayout level_layout(int level) const override {
    VQKV_CHECK(level == 0 || level == 1);
    CodeLayout out = layout_;
    if (level == 0) out.fields[1].slots = 0;
    return out;
  }
  TrainReport train(const TrainSet&, const Rng&) override { return {}; }

  void encode(ConstMatrix x, CodeBlock& out, const SequenceState* = nullptr) const override {
    upper_.encode(x, out);
    out.fields.emplace_back(out.fields[0].size());
    const int width = channels(), tokens = layout_.block_tokens, slots = layout_.sides[0].slots;
    parallel_chunks(x.rows, 32, [&](int64_t first, int64_t end) {
      for (int64_t t = first; t < end; ++t)
        for (int c = 0; c < width; ++c) {
          const auto side = static_cast<size_t>(t / tokens * slots + c / group_channels_);
          const auto at = static_cast<size_t>(t * width + c);
          const double scale = out.sides[0][side], zero = out.sides[1][side];
          const double rest = (x(t, c) - zero - out.fields[0][at] * scale) / (scale * kFiner);
          out.fields[1][at] =
              static_cast<uint16_t>(std::nearbyint(std::clamp(rest, double{-kZero}, double{kZero - 1})) + kZero);
        }
    });
  }

  DecodePlan plan(const PlanQuery& query = {}) const override {
    VQKV_CHECK(query.level < levels());
    DecodePlan plan = upper_.plan();
    plan.layout = layout_;
    if (query.level == 0) return plan;
    LevelsTerm lower = upper_.term();
    lower.field = 1;
    lower.zero_side = -1;
    for (int code = 0; code < 1 << kNibble; ++code) lower.levels.push_back(static_cast<float>((code - kZero) * kFiner));
    plan.terms.emplace_back(lower);
    return plan;
  }
  using Codec::constant_bytes;
  int64_t constant_bytes(CountedBooks&) const override { return 0; }  // the lower levels are the format's

  void save(ParameterWriter&) const override {}
  void load(const ParameterReader&) override {}

 private:
  AffineCodec upper_;
  CodeLayout layout_;
  int group_channels_;  // of a scale
};

MethodInfo describe_quantspec() {
  MethodInfo info;
  info.name = "quantspec";
  info.title = "8-bit codes of two nibbles: the upper ones are a 4-bit cache by themselves";
  info.paper =
      "Tiwari et al., QuantSpec: Self-Speculative Decoding with Hierarchical Quantized KV Cache, ICML 2025, arXiv "
      "2502.10424";
  info.bibtex = "tiwari2025quantspec";
  info.family = "levels";
  info.bits = "8 + 32 / (group == 0 ? head_dim : group)";
  info.trained = false;
  info.caveat =
      "what is left over above 7.5 lower steps is clamped to the last code, 1 value in 32 of an even spread: there the "
      "error reaches a whole lower step; the strategy quantspec drafts from the upper nibbles (level 1 of tiers)";
  info.rope = {"post"};
  const auto buffer = [](int group) {  // the newest G to 2G - 1 tokens
    return Json{{"sinks", 0}, {"rule", "window"}, {"window", group + 1}, {"flush", group}};
  };
  info.presets = {
      {"default", {{"cache", buffer(128)}, {"note", "the double buffer of 128 + 128 tokens; at head_dim 128"}}},
      {"g64", {{"codec", {{"group", 64}}}, {"cache", buffer(64)}, {"note", "the same for head_dim 64"}}}};
  return info;
}

std::string check_quantspec(const QuantSpecKnobs& k, const UnitShape& unit) {
  return unit.role == Role::kValue ? check_head_group(group_of(k, unit), unit) : "";
}

}  // namespace

VQKV_DEFINE_METHOD(quantspec, QuantSpecKnobs, QuantSpecCodec, describe_quantspec, check_quantspec)

}  // namespace vqkv
