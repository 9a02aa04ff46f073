// Eight-bit floating point, as vLLM and others keep a cache: a value over a scale, rounded to E4M3 or E5M2. The codes
// are the bytes of the format.
#include <algorithm>
#include <cmath>

#include "codec/codec.h"
#include "core/error.h"
#include "core/thread_pool.h"

namespace vqkv {
namespace {

struct Fp8Knobs {
  std::string format = "e4m3";
  std::string scale = "one";
  double range = 0;
  KnobTable table() {
    return KnobTable()
        .choice("format", &format, {"e4m3", "e5m2"}, "3 bits of mantissa up to 448, or 2 up to 57344")
        .choice("scale", &scale, {"one", "tensor", "head"},
                "1, or from the largest magnitude among the training tokens: of the unit (with heads: all, of a layer "
                "and role as in vLLM), or of each of its heads")
        .real("range", &range, 0, 57344, "what that largest magnitude becomes; 0: the largest of the format");
  }
  TrainNeeds needs() const { return {.rows = scale != "one"}; }
};

class Fp8Codec final : public Codec {
 public:
  Fp8Codec(const Fp8Knobs& knobs, const UnitShape& unit)
      : knobs_(knobs), head_dim_(unit.head_dim), rope_(unit.rope), scale_(static_cast<size_t>(unit.heads), 1.0f) {
    layout_.fields = {{"code", 8, unit.channels(), true}};
  }

  int channels() const override { return layout_.fields[0].slots; }
  const CodeLayout& layout() const override { return layout_; }
  RopePlacement rope() const override { return rope_; }

  TrainReport train(const TrainSet& set, const Rng&) override {
    TrainReport report;
    if (knobs_.scale == "one") return report;
    check_encode_input(*this, set.x);
    report.vectors = set.x.rows;
    std::vector<double> most(scale_.size(), 0.0);
    for (int64_t t = 0; t < set.x.rows; ++t)
      for (int64_t c = 0; c < set.x.cols; ++c) {
        double& m = most[static_cast<size_t>(c / head_dim_)];
        m = std::max(m, std::abs(double{set.x(t, c)}));
      }
    if (knobs_.scale == "tensor") std::fill(most.begin(), most.end(), *std::max_element(most.begin(), most.end()));
    const double range = knobs_.range > 0 ? knobs_.range : largest();
    for (size_t h = 0; h < scale_.size(); ++h)
      if (most[h] > 0) scale_[h] = std::max(static_cast<float>(most[h] / range), 0x1p-126f);
    return report;
  }

  // Saturates, as the conversions of the hardware are asked to.
  void encode(ConstMatrix x, CodeBlock& out, const SequenceState*) const override {
    check_encode_input(*this, x);
    out.resize(layout_, x.rows);
    const float most = largest();
    parallel_chunks(x.rows, 32, [&](int64_t first, int64_t end) {
      for (int64_t t = first; t < end; ++t)
        for (size_t h = 0; h < scale_.size(); ++h) {
          const int64_t low = static_cast<int64_t>(h) * head_dim_;
          uint16_t* codes = out.fields[0].data() + t * x.cols + low;
          for (int c = 0; c < head_dim_; ++c) {
            const float v = std::clamp(x(t, low + c) / scale_[h], -most, most);
            codes[c] = e4m3() ? to_f8e4m3(v).bits : to_f8e5m2(v).bits;
          }
        }
    });
  }

  DecodePlan plan(const PlanQuery&) const override {
    DecodePlan plan = empty_plan();
    LevelsTerm term;
    for (int code = 0; code < 256; ++code) {
      const auto bits = static_cast<uint8_t>(code);
      term.levels.push_back(e4m3() ? to_float(f8e4m3{bits}) : to_float(f8e5m2{bits}));
    }
    plan.terms = {term};
    if (std::any_of(scale_.begin(), scale_.end(), [](float s) { return s != 1; })) {
      DiagonalMap map;
      for (int c = 0; c < channels(); ++c) map.factor.push_back(scale_[static_cast<size_t>(c / head_dim_)]);
      plan.map = map;
    }
    return plan;
  }

  // Levels are the format's; of the scales, those that can differ.
  int64_t constant_bytes(CountedBooks&) const override {
    const size_t scales = knobs_.scale == "one" ? 0 : knobs_.scale == "tensor" ? 1 : scale_.size();
    return static_cast<int64_t>(scales * sizeof(float));
  }

  void save(ParameterWriter& out) const override {
    out.tensor("scale", {static_cast<int64_t>(scale_.size())}, scale_.data());
  }
  void load(const ParameterReader& in) override {
    const AlignedVector<float> scale = in.tensor("scale", {static_cast<int64_t>(scale_.size())});
    for (const float v : scale)
      if (!(std::isfinite(v) && v > 0)) fail_data("scale: must be positive and finite");
    scale_.assign(scale.begin(), scale.end());
  }

 private:
  bool e4m3() const { return knobs_.format == "e4m3"; }
  float largest() const { return e4m3() ? 448.0f : 57344.0f; }

  Fp8Knobs knobs_;
  int head_dim_;
  RopePlacement rope_;
  std::vector<float> scale_;  // of each head
  CodeLayout layout_;
};

MethodInfo describe_fp8() {
  MethodInfo info;
  info.name = "fp8";
  info.title = "8-bit floating point, E4M3 or E5M2, with a constant scale";
  info.paper =
      "Micikevicius et al., FP8 Formats for Deep Learning, arXiv 2209.05433; as a cache: vLLM, Quantized KV Cache "
      "(documentation)";
  info.bibtex = "micikevicius2022fp8";
  info.family = "levels";
  info.bits = "8";
  info.trained = false;  // but for a calibrated scale: Fp8Knobs::needs
  info.caveat =
      "values beyond scale times 448 (E4M3) saturate silently: a scale that was fitted to other texts can clip keys. "
      "vLLM's FlashAttention-3 path also rounds queries to E4M3, which is not done here";
  info.presets = {
      {"default", {{"note", "vLLM's kv_cache_dtype fp8: E4M3, scale 1"}}},
      {"e5m2", {{"codec", {{"format", "e5m2"}}}}},
      {"tensor",
       {{"codec", {{"scale", "tensor"}, {"heads", "all"}}},
        {"note", "a calibrated scale for keys and one for values of each layer"}}},
      {"head", {{"codec", {{"scale", "head"}}}, {"note", "a calibrated scale for each KV head, as llm-compressor"}}},
      {"warm_up",
       {{"codec", {{"scale", "tensor"}, {"heads", "all"}, {"k", {{"range", 200}}}, {"v", {{"range", 100}}}}},
        {"note", "vLLM's calculate_kv_scales, on training tokens instead of random ones"}}}};
  return info;
}

std::string check_fp8(const Fp8Knobs& k, const UnitShape&) {
  if (k.format == "e4m3" && k.range > 448) return "e4m3 ends at 448: range must not be above";
  return "";
}

}  // namespace

VQKV_DEFINE_METHOD(fp8, Fp8Knobs, Fp8Codec, describe_fp8, check_fp8)

}  // namespace vqkv
