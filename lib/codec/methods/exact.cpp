// The exact cache as a codec: values rounded to a storage type and nothing else. The identity that every other codec is
// measured against.
#include "codec/codec.h"

namespace vqkv {
namespace {

struct ExactKnobs {
  std::string dtype = "f16";
  KnobTable table() { return KnobTable().choice("dtype", &dtype, {"f16", "bf16", "f32"}, "how a value is stored"); }
};

class ExactCodec final : public Codec {
 public:
  ExactCodec(const ExactKnobs& knobs, const UnitShape& unit) : type_(dtype_from_name(knobs.dtype)), rope_(unit.rope) {
    layout_.sides = {{"x", type_, unit.channels(), true}};
  }

  int channels() const override { return layout_.sides[0].slots; }
  const CodeLayout& layout() const override { return layout_; }
  RopePlacement rope() const override { return rope_; }
  TrainReport train(const TrainSet&, const Rng&) override { return {}; }

  void encode(ConstMatrix x, CodeBlock& out, const SequenceState*) const override {
    check_encode_input(*this, x);
    out.resize(layout_, x.rows);
    float* values = out.sides[0].data();
    for (int64_t t = 0; t < x.rows; ++t)
      for (int64_t c = 0; c < x.cols; ++c) *values++ = round_side(type_, x(t, c));
  }

  DecodePlan plan(const PlanQuery&) const override { return dense_plan(); }

  void save(ParameterWriter&) const override {}
  void load(const ParameterReader&) override {}

 private:
  DType type_;
  RopePlacement rope_;
  CodeLayout layout_;
};

MethodInfo describe_exact() {
  MethodInfo info;
  info.name = "exact";
  info.title = "values as the model made them, rounded to a storage type";
  info.family = "dense";
  info.bits = "dtype == f32 ? 32 : 16";
  info.trained = false;
  info.caveat = "float16 saturates at 65504; the yardstick of every table, not a compression";
  info.presets = {{"default", {{"note", "what inference engines keep"}}},
                  {"bf16", {{"codec", {{"dtype", "bf16"}}}}},
                  {"f32", {{"codec", {{"dtype", "f32"}}}, {"note", "golden tests"}}},
                  {"think",
                   {{"codec", {{"k", {{"transform", {"think"}}}}}},
                    {"note", "ThinK alone, less its window and what it keeps behind the prompt: `explain think`"}}}};
  return info;
}

std::string check_exact(const ExactKnobs&, const UnitShape&) { return ""; }

}  // namespace

VQKV_DEFINE_METHOD(exact, ExactKnobs, ExactCodec, describe_exact, check_exact)

}  // namespace vqkv
