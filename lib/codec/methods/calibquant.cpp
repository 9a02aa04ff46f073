// CalibQuant: a range a channel for all tokens of a prompt, clipped toward zero (baseline-methods 5).
#include <fmt/format.h>

#include <algorithm>

#include "codec/methods/affine.h"
#include "core/thread_pool.h"

namespace vqkv {
namespace {

struct CalibQuantKnobs {
  int bits = 1;
  double key_clip = 0.5, value_clip = 0.3;
  double low_shift = 0, high_shift = 0;
  KnobTable table() {
    return KnobTable()
        .integer("bits", &bits, 1, 8, "bits of a code (the paper: 1, 2, 4 or 8)")
        .real("key_clip", &key_clip, 0.05, 1, "keys: multiplies both ends of a channel's range")
        .real("value_clip", &value_clip, 0.05, 1, "the same for values")
        .real("low_shift", &low_shift, 0, 64, "added to the lowest score that a query gives the coded tokens")
        .real("high_shift", &high_shift, 0, 64,
              "taken from the highest; the scores between follow in proportion (the paper: 3 at 1 and 2 bits)");
  }
};

class CalibQuantCodec final : public Codec {
 public:
  CalibQuantCodec(const CalibQuantKnobs& k, const UnitShape& unit) : unit_(unit) {
    grid_.bits = k.bits;
    grid_.clip = unit.role == Role::kKey ? k.key_clip : k.value_clip;
    if (unit.role == Role::kKey && (k.low_shift > 0 || k.high_shift > 0))
      score_ = {ScoreMap::Kind::kRange, static_cast<float>(k.low_shift), static_cast<float>(k.high_shift)};
    layout_.fields = {{"code", k.bits, unit.channels(), true}};
  }

  int channels() const override { return unit_.channels(); }
  const CodeLayout& layout() const override { return layout_; }
  RopePlacement rope() const override { return unit_.rope; }
  TrainReport train(const TrainSet&, const Rng&) override { return {}; }

  FitNeeds fit_needs() const override { return {.tokens = 16}; }
  std::unique_ptr<SequenceState> fit(ConstMatrix k, ConstMatrix v, ConstMatrix) const override {
    const ConstMatrix x = unit_.role == Role::kKey ? k : v;
    auto ranges = std::make_unique<Ranges>();
    for (int64_t c = 0; c < x.cols; ++c) {
      float low = x(0, c), high = x(0, c);
      for (int64_t t = 1; t < x.rows; ++t) {
        low = std::min(low, x(t, c));
        high = std::max(high, x(t, c));
      }
      ranges->line.push_back(grid_.line(low, high));
    }
    return ranges;
  }

  void encode(ConstMatrix x, CodeBlock& out, const SequenceState* state) const override {
    check_encode_input(*this, x);
    out.resize(layout_, x.rows);
    const AffineRun run = grid_.run();
    parallel_chunks(x.cols, 32, [&](int64_t first, int64_t end) {
      for (int64_t c = first; c < end; ++c)
        run(line_of(state, c), grid_.bits, x.data + c, x.stride, out.fields[0].data() + c, x.cols, x.rows);
    });
  }

  DecodePlan plan(const PlanQuery& query) const override {
    DecodePlan plan = empty_plan();
    plan.terms = {LevelsTerm()};
    plan.score = score_;
    DiagonalMap scales;
    for (int c = 0; c < channels(); ++c) {
      const AffineLine line = line_of(query.state, c);
      scales.factor.push_back(line.scale);
      plan.outer_bias.push_back(line.zero);
    }
    plan.map = std::move(scales);
    return plan;
  }

  using Codec::constant_bytes;
  int64_t constant_bytes(CountedBooks&) const override { return 0; }  // ranges are each prompt's
  void save(ParameterWriter&) const override {}
  void load(const ParameterReader&) override {}

 private:
  struct Ranges final : SequenceState {
    std::vector<AffineLine> line;  // (channels), of which scale and zero are stored, in f16

    int64_t bytes() const override { return 2 * 2 * static_cast<int64_t>(line.size()); }
  };
  // Before a prompt codes are numbers.
  static AffineLine line_of(const SequenceState* state, int64_t c) {
    return state ? static_cast<const Ranges*>(state)->line[static_cast<size_t>(c)] : AffineLine();
  }

  UnitShape unit_;
  AffineGrid grid_;
  ScoreMap score_;
  CodeLayout layout_;
};

MethodInfo describe_calibquant() {
  MethodInfo info;
  info.name = "calibquant";
  info.title = "a range a channel of keys and of values for all tokens of a prompt, clipped toward zero";
  info.paper = "Han et al., CalibQuant: 1-Bit KV Cache Quantization for Multimodal LLMs, 2025, arXiv 2502.14882";
  info.bibtex = "han2025calibquant";
  info.family = "levels";
  info.bits = "bits";
  info.trained = false;
  info.images_alone = true;
  info.caveat =
      "two f16 numbers a channel are stored for each prompt: 32/T bits a value over T coded tokens. The paper codes "
      "the tokens of an image alone and keeps text and what is generated exact: `cache: {coded: image}`, as the "
      "presets, on traces that tell them apart (`dump_hf.py --image`). Rows that code text are flagged off-label: "
      "`cache: {sinks: 41, window: 0, flush: 1, prompt: N, generated: exact}` takes a prompt's tokens for an image's, "
      "and then ranges hold the sinks, too, and later values beyond them are clipped. On text its values along "
      "channels fail where KIVI's do not";
  info.assumed =
      "how the clips and shifts were tuned is unconfirmed: they are the numbers of the authors' code, which has one "
      "image a text, too";
  const Json images = {{"coded", "image"}};
  info.presets = {
      {"default",
       {{"codec", {{"high_shift", 3}}},
        {"cache", images},
        {"note", "1 bit, with calibrated scores: the authors' code"}}},
      {"b2",
       {{"codec", {{"bits", 2}, {"key_clip", 1}, {"value_clip", 1}, {"high_shift", 3}}},
        {"cache", images},
        {"note", "2 bits, with calibrated scores"}}},
      {"b4", {{"codec", {{"bits", 4}, {"key_clip", 1}, {"value_clip", 1}}}, {"cache", images}, {"note", "4 bits"}}},
      {"b8", {{"codec", {{"bits", 8}, {"key_clip", 1}, {"value_clip", 1}}}, {"cache", images}, {"note", "8 bits"}}}};
  return info;
}

std::string check_calibquant(const CalibQuantKnobs&, const UnitShape&) { return ""; }

}  // namespace

VQKV_DEFINE_METHOD(calibquant, CalibQuantKnobs, CalibQuantCodec, describe_calibquant, check_calibquant)

}  // namespace vqkv
