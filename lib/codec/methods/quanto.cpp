// transformers' QuantizedCache with the back end quanto: ranges from least to largest value, in the arithmetic of the
// model's type, whose every operation is rounded to it. Codes, scales and zeros are those of optimum-quanto, bit for
// bit (tests/codec/test_quantized_cache.cpp).
#include <algorithm>
#include <cmath>
#include <numeric>

#include "codec/methods/tensor_groups.h"

namespace vqkv {
namespace {

struct QuantoKnobs {
  int bits = 4;
  int group = 64;
  int axis = 0;
  std::string dtype = "bf16";
  KnobTable table() {
    return KnobTable()
        .integer("bits", &bits, 2, 4, "bits of a code: 2 or 4 (nbits)")
        .integer("group", &group, 2, 1024, "values that share a scale (q_group_size)")
        .integer("axis", &axis, -1, 0,
                 "0: neighbours in memory, along the channels of a token; -1: tokens of a channel (axis_key, "
                 "axis_value)")
        .choice("dtype", &dtype, {"bf16", "f16", "f32"},
                "the model's: its arithmetic, and the storage of scales and zeros");
  }
};

class QuantoCodec final : public TensorCodec {
 public:
  QuantoCodec(const QuantoKnobs& k, const UnitShape& unit) : TensorCodec(of(k, unit), unit) {}

 private:
  static TensorGroups of(const QuantoKnobs& k, const UnitShape& unit) {
    TensorGroups g;
    g.bits = k.bits;
    g.group = k.group;
    g.type = dtype_from_name(k.dtype);
    if (k.axis == 0) {
      g.tokens = k.group / std::gcd(k.group, unit.head_dim);  // the fewest whose groups end with them
    } else {
      g.form = TensorGroups::Form::kTokens;
      g.tokens = k.group;
    }
    return g;
  }

  void code(ConstMatrix x, uint16_t* codes, float* scale, float* zero) const override {
    const float top = static_cast<float>((1 << groups().bits) - 1);
    for (int64_t g = 0; g < x.rows; ++g) {
      const float* v = x.row(g);
      const auto [low, high] = std::minmax_element(v, v + x.cols);
      const float least = *low, step = rounded(rounded(std::min(*high - least, 3.0e38f)) / top);
      for (int64_t i = 0; i < x.cols; ++i) {
        const float level = step > 0 ? rounded(rounded(v[i] - least) / step) : 0;  // all alike: their least value
        *codes++ = static_cast<uint16_t>(std::clamp(std::nearbyint(level), 0.0f, top));
      }
      scale[g] = step;
      zero[g] = least;
    }
  }
};

MethodInfo describe_quanto() {
  MethodInfo info;
  info.name = "quanto";
  info.title =
      "transformers' QuantizedCache, back end quanto: min-max groups of neighbours, scales in the model's type";
  info.paper =
      "huggingface/transformers, QuantizedCache (src/transformers/cache_utils.py, 5.23.0) with "
      "huggingface/optimum-quanto 0.2.7";
  info.family = "levels";
  info.bits = "bits + (dtype == f32 ? 64 : 32) / group";
  info.trained = false;
  info.caveat =
      "keys and values are coded along the channels of a token, not as KIVI codes keys; axis -1 does, which the "
      "library refuses where heads times tokens are no multiple of the group. The prompt is coded whole, its newest "
      "tokens too, and its own queries see it exactly, so one pass over a text measures nothing: say cache.prompt. "
      "Each 128 tokens the library decodes all and codes all again; that gives the same codes but for the last bit "
      "of some scales (tests/golden/make_quantized_cache_goldens.py measures 1.000 times the error after 8 times), "
      "so here what is coded stays. The library rounds what it decodes to the model's type, which is not done here. "
      "Where a group reaches over tokens (head_dim not a multiple of it), a last group over two heads is left exact";
  const Json cache = {{"sinks", 0}, {"rule", "residual"}, {"residual", 128}, {"exact_dtype", "bf16"}};
  info.presets = {
      {"default",
       {{"cache", cache}, {"note", "4 bits, axis 0, groups of 64, 128 exact tokens: the library's defaults"}}},
      {"b2", {{"codec", {{"bits", 2}}}, {"cache", cache}}},
      {"per_channel_keys",
       {{"codec", {{"k", {{"axis", -1}}}}}, {"cache", cache}, {"note", "axis_key -1: groups of tokens, KIVI's axes"}}}};
  return info;
}

std::string check_quanto(const QuantoKnobs& k, const UnitShape&) {
  return k.bits == 3 ? "quanto has codes of 2 and of 4 bits" : "";
}

}  // namespace

VQKV_DEFINE_METHOD(quanto, QuantoKnobs, QuantoCodec, describe_quanto, check_quanto)

}  // namespace vqkv
