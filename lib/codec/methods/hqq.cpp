// transformers' QuantizedCache with the back end HQQ: ranges from least to largest value in fp32, then up to 20 steps
// that move the zeros so that few values err much (half-quadratic splitting of a norm below 1; scales stay). How many
// steps are made is decided for all of a tensor at once. Held against the package hqq on a CPU in
// tests/codec/test_quantized_cache.cpp.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "codec/methods/tensor_groups.h"

namespace vqkv {
namespace {

struct HqqKnobs {
  int bits = 4;
  int group = 64;
  int axis = 0;
  int tokens = 128;
  std::string dtype = "bf16";
  KnobTable table() {
    return KnobTable()
        .integer("bits", &bits, 1, 8, "bits of a code: 1, 2, 3, 4 or 8 (nbits)")
        .integer("group", &group, 8, 1024, "values that share a scale (q_group_size)")
        .integer("axis", &axis, 0, 1,
                 "0: a group's values are spread evenly over the memory of heads, tokens and channels; 1: neighbours "
                 "in it (axis_key, axis_value)")
        .integer("tokens", &tokens, 1, 16384,
                 "tokens that are quantized in one call, which groups of axis 0 reach over and the steps are counted "
                 "for: of a prompt or of a residual")
        .choice("dtype", &dtype, {"bf16", "f16", "f32"}, "the model's: the storage of scales and zeros");
  }
};

// Codes, and bits beside them, of 3-bit groups: ten to a 32-bit word.
int padding_of(const HqqKnobs& k) { return k.bits == 3 ? 32 * ((k.group + 9) / 10) - 3 * k.group : 0; }

class HqqCodec final : public TensorCodec {
 public:
  HqqCodec(const HqqKnobs& k, const UnitShape& unit) : TensorCodec(of(k), unit) {}

 private:
  static TensorGroups of(const HqqKnobs& k) {
    TensorGroups g;
    g.form = k.axis == 0 ? TensorGroups::Form::kStrided : TensorGroups::Form::kNeighbours;
    g.bits = k.bits;
    g.group = k.group;
    g.tokens = k.tokens;
    g.type = dtype_from_name(k.dtype);
    g.zero_of_codes = true;
    g.padding = padding_of(k);
    return g;
  }

  // What values become codes by: round(x * inverse + zero).
  struct Line {
    float inverse = 1, zero = 0;
    float code(float x, float top) const { return std::clamp(std::nearbyint(x * inverse + zero), 0.0f, top); }
  };

  static Line range_of(const float* v, int64_t n, float top) {
    const auto [low, high] = std::minmax_element(v, v + n);
    const float range = *high - *low;
    Line line;
    line.inverse = range <= 1e-4f ? 1.0f : std::min(top / range, 2e4f);
    line.zero = -*low * line.inverse;
    return line;
  }

  // One step over a group: the mean of the zeros that its values would have if errors shrank as the norm says. Gives
  // the sum of the errors before it.
  static double step(const float* v, int64_t n, float top, Line& line) {
    // The package's beta and norm. Its kappa, which would raise beta from step to step, is not used on this path.
    constexpr float kWeight = 1 / 10.0f;
    constexpr auto kPower = static_cast<double>(0.7f - 1.0f);
    double errors = 0, zeros = 0;
    for (int64_t i = 0; i < n; ++i) {
      const float code = line.code(v[i], top), error = v[i] - (code - line.zero) / line.inverse;
      const float size = std::abs(error);
      float shrunk = size > 0 ? std::max(size - kWeight * static_cast<float>(std::pow(double{size}, kPower)), 0.0f) : 0;
      if (error < 0) shrunk = -shrunk;
      errors += size;
      zeros += code - (v[i] - shrunk) * line.inverse;
    }
    line.zero = static_cast<float>(zeros / static_cast<double>(n));
    return errors;
  }

  void code(ConstMatrix x, uint16_t* codes, float* scale, float* zero) const override {
    constexpr int kSteps = 20;
    const auto top = static_cast<float>((1 << groups().bits) - 1);
    std::vector<Line> lines(static_cast<size_t>(x.rows));
    for (int64_t g = 0; g < x.rows; ++g) lines[static_cast<size_t>(g)] = range_of(x.row(g), x.cols, top);
    float least = std::numeric_limits<float>::infinity();
    for (int i = 0; i < kSteps; ++i) {
      double errors = 0;
      for (int64_t g = 0; g < x.rows; ++g) errors += step(x.row(g), x.cols, top, lines[static_cast<size_t>(g)]);
      // The step that no longer helped is kept, as in the package.
      const auto mean = static_cast<float>(errors / static_cast<double>(x.rows * x.cols));
      if (!(mean < least)) break;
      least = mean;
    }
    for (int64_t g = 0; g < x.rows; ++g) {
      const Line& line = lines[static_cast<size_t>(g)];
      for (int64_t i = 0; i < x.cols; ++i) *codes++ = static_cast<uint16_t>(line.code(x(g, i), top));
      scale[g] = rounded(std::min(1 / line.inverse, 1e36f));  // what is decoded is finite
      zero[g] = rounded(-line.zero);
    }
  }
};

MethodInfo describe_hqq() {
  MethodInfo info;
  info.name = "hqq";
  info.title =
      "transformers' QuantizedCache, back end HQQ: groups over the whole tensor, zeros moved for few large errors";
  info.paper =
      "huggingface/transformers, QuantizedCache (src/transformers/cache_utils.py, 5.23.0) with hqq 0.2.8.post1 (Badri "
      "and Shaji, Half-Quadratic Quantization of Large Machine Learning Models, 2023)";
  info.family = "levels";
  info.bits = "(bits == 3 ? 32 * ceil(group / 10) / group : bits) + (dtype == f32 ? 64 : 32) / group";
  info.trained = false;
  info.caveat =
      "with axis 0, the library's default, a group takes every n-th value of heads, tokens and channels, n the "
      "values of the tensor over the group: of one channel where heads times tokens are a multiple of the group, "
      "else of several, which costs most of it. So it depends on how many tokens are quantized together (tokens: "
      "those of cache.prompt, with generated: exact, are the library's call; all heads in a unit). Each 128 tokens "
      "the library decodes all and codes all again in other groups: its error grows, to 2.0 times after one and 9.2 "
      "after eight at 4 bits (tests/golden/make_quantized_cache_goldens.py); here what is coded stays, 128 tokens at "
      "a time, which is kinder to it. Axis 1 doesn't grow. 3 bits take 3.5, ten codes to 32 bits, and axis 1 has "
      "none: the package cannot decode them. 1-bit codes are worse than zeros. On a GPU the package makes the steps "
      "in float16; here as on a CPU, in fp32, but for the order of sums, which may turn the last bit of a zero";
  const Json cache = {{"sinks", 0}, {"rule", "residual"}, {"residual", 128}, {"exact_dtype", "bf16"}};
  const auto preset = [&](int bits, int axis, const char* note) {
    Json out = {{"codec", {{"heads", "all"}, {"bits", bits}, {"axis", axis}}}, {"cache", cache}};
    if (*note) out["note"] = note;
    return out;
  };
  info.presets = {{"default", preset(4, 0, "4 bits, axis 0, groups of 64, 128 exact tokens: the library's defaults")},
                  {"axis1", preset(4, 1, "groups along the channels of a token")},
                  {"b8", preset(8, 0, "")},
                  {"b3", preset(3, 0, "")},
                  {"b2", preset(2, 0, "")},
                  {"b1", preset(1, 0, "")}};
  return info;
}

std::string check_hqq(const HqqKnobs& k, const UnitShape& unit) {
  if (k.bits > 4 && k.bits < 8) return "hqq packs codes of 1, 2, 3, 4 and 8 bits";
  const int64_t values = int64_t{k.tokens} * unit.channels();
  if (values % k.group != 0)
    return fmt::format("{} tokens of {} channels are not a multiple of a group of {}", k.tokens, unit.channels(),
                       k.group);
  if (k.bits == 3 && k.axis == 1) return "hqq cannot decode 3 bits with axis 1";
  if (k.bits == 3 && k.group % 16 != 0)
    return fmt::format("3 bits need groups of a multiple of 16, not of {}", k.group);
  // Packed are values a group or groups a tensor apart.
  const int64_t rows = k.axis == 0 ? k.group : values / k.group;
  if (k.bits != 3 && rows % (8 / k.bits) != 0)
    return fmt::format("{} {} don't fill bytes of {} codes", rows, k.axis == 0 ? "values a group" : "groups",
                       8 / k.bits);
  return "";
}

}  // namespace

VQKV_DEFINE_METHOD(hqq, HqqKnobs, HqqCodec, describe_hqq, check_hqq)

}  // namespace vqkv
