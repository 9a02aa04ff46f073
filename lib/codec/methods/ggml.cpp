// The block formats that llama.cpp keeps caches in: 32 neighbouring channels of a token share a float16 scale and, in
// the formats that end in _1, a float16 minimum. Codes and scales are those of ggml's reference quantizers, bit for bit
// (tests/codec/test_engines.cpp): float32 operations in their order, each rounded once.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "codec/codec.h"
#include "core/error.h"
#include "core/thread_pool.h"
#include "io/ggml_dequant.h"

namespace vqkv {
namespace {

constexpr int kBlock = 32;

// Of one block. x ~ minimum + scale * level(code); still float32, codes follow from these and not from what is stored.
struct Scales {
  float scale = 0, minimum = 0;
};

// 1 / d, and 0 where a group has no spread or one whose inverse is no number: its scale is stored as 0.
float inverse_of(float d) {
  const float inverse = 1.0f / d;
  return std::isfinite(inverse) ? inverse : 0.0f;
}

// Towards 0, into 0..top.
uint16_t truncated(float v, int top) {
  return static_cast<uint16_t>(v >= static_cast<float>(top) ? top : v > 0 ? static_cast<int>(v) : 0);
}

// The first value of the largest magnitude.
float loudest(const float* x) {
  float most = 0;
  for (int i = 0; i < kBlock; ++i)
    if (std::abs(x[i]) > std::abs(most)) most = x[i];
  return most;
}

// Half away from zero.
Scales code_q8_0(const float* x, uint16_t* codes) {
  const float d = std::abs(loudest(x)) / 127.0f, inverse = inverse_of(d);
  for (int i = 0; i < kBlock; ++i) {
    const float v = std::clamp(x[i] * inverse, -127.0f, 127.0f);
    codes[i] = static_cast<uint16_t>(128 + static_cast<int>(double{v} + (v < 0 ? -0.5 : 0.5)));
  }
  return {d, 0};
}

// The loudest value is level -2^(bits-1) exactly, whatever its sign. Product and sum are rounded once, as compilers
// contract them; the sum in double, which the `gguf` Python package does too.
template <int bits>
Scales code_around_zero(const float* x, uint16_t* codes) {
  constexpr int kHalf = 1 << (bits - 1);
  const float d = loudest(x) / static_cast<float>(-kHalf), inverse = inverse_of(d);
  for (int i = 0; i < kBlock; ++i)
    codes[i] = truncated(static_cast<float>(double{x[i]} * inverse + (kHalf + 0.5)), 2 * kHalf - 1);
  return {d, 0};
}

template <int bits>
Scales code_from_minimum(const float* x, uint16_t* codes) {
  constexpr int kTop = (1 << bits) - 1;
  const auto [low, high] = std::minmax_element(x, x + kBlock);
  const float minimum = *low, d = (*high - minimum) / static_cast<float>(kTop), inverse = inverse_of(d);
  for (int i = 0; i < kBlock; ++i) codes[i] = truncated((x[i] - minimum) * inverse + 0.5f, kTop);
  return {d, minimum};
}

// Sixteen uneven levels. The loudest value goes to level 0, -127; then the scale that fits these codes best, each value
// weighed by its square. The codes are not chosen again.
Scales code_iq4_nl(const float* x, uint16_t* codes) {
  static const auto kBetween = [] {
    std::array<float, 15> middles;
    const auto levels = ggml_iq4_nl_levels();
    for (size_t i = 0; i < middles.size(); ++i) middles[i] = (levels[i] + levels[i + 1]) / 2;
    return middles;
  }();
  const auto levels = ggml_iq4_nl_levels();
  const float most = loudest(x);
  if (std::abs(most) < 1e-15f) {
    std::fill_n(codes, kBlock, uint16_t{0});
    return {};
  }
  const float d = most / levels[0], inverse = 1.0f / d;
  float fit = 0, power = 0;
  for (int i = 0; i < kBlock; ++i) {
    const float v = x[i] * inverse;
    int code = 0;
    for (const float middle : kBetween) code += v >= middle;
    codes[i] = static_cast<uint16_t>(code);
    const float level = levels[static_cast<size_t>(code)], weighed = x[i] * x[i] * level;
    fit += weighed * x[i];
    power += weighed * level;
  }
  const float fitted = fit / power;
  return {std::isfinite(fitted) ? fitted : d, 0};  // squares above 1.8e19 are no float32
}

struct Format {
  const char* name;
  int bits;
  bool minimum;
  float offset;  // level(code) = code - offset; iq4_nl has a table
  Scales (*code)(const float* x, uint16_t* codes);
};
constexpr std::array<Format, 6> kFormats{{{"q8_0", 8, false, 128, code_q8_0},
                                          {"q5_1", 5, true, 0, code_from_minimum<5>},
                                          {"q5_0", 5, false, 16, code_around_zero<5>},
                                          {"q4_1", 4, true, 0, code_from_minimum<4>},
                                          {"q4_0", 4, false, 8, code_around_zero<4>},
                                          {"iq4_nl", 4, false, 0, code_iq4_nl}}};

const Format& format_of(const std::string& name) {
  for (const Format& f : kFormats)
    if (f.name == name) return f;
  fail_internal("a ggml format without a rule");
}

struct GgmlKnobs {
  std::string type = "q4_0";
  std::string query = "exact";
  KnobTable table() {
    std::vector<std::string> names;
    for (const Format& f : kFormats) names.emplace_back(f.name);
    return KnobTable()
        .choice("type", &type, names, "block format, as llama.cpp's -ctk and -ctv name it")
        .choice("query", &query, {"exact", "q8"},
                "for k alone: queries as they are where they meet coded keys, or rounded to q8_0 as on llama.cpp's CPU "
                "path");
  }
};

class GgmlCodec final : public Codec {
 public:
  GgmlCodec(const GgmlKnobs& knobs, const UnitShape& unit)
      : format_(format_of(knobs.type)),
        query_(knobs.query == "q8" ? QueryForm::kQ8 : QueryForm::kExact),
        rope_(unit.rope) {
    layout_.fields = {{"code", format_.bits, unit.channels(), true}};
    layout_.sides = {{"scale", DType::kF16, unit.channels() / kBlock, true}};
    if (format_.minimum) layout_.sides.push_back({"minimum", DType::kF16, unit.channels() / kBlock, true});
  }

  int channels() const override { return layout_.fields[0].slots; }
  const CodeLayout& layout() const override { return layout_; }
  RopePlacement rope() const override { return rope_; }
  QueryForm query_form() const override { return query_; }
  TrainReport train(const TrainSet&, const Rng&) override { return {}; }

  void encode(ConstMatrix x, CodeBlock& out, const SequenceState*) const override {
    check_encode_input(*this, x);
    out.resize(layout_, x.rows);
    const int blocks = layout_.sides[0].slots;
    parallel_chunks(x.rows, 32, [&](int64_t first, int64_t end) {
      for (int64_t t = first; t < end; ++t)
        for (int b = 0; b < blocks; ++b) {
          const auto at = static_cast<size_t>(t * blocks + b);
          const Scales s = format_.code(x.row(t) + b * kBlock, out.fields[0].data() + at * kBlock);
          out.sides[0][at] = round_side(DType::kF16, s.scale);
          if (format_.minimum) out.sides[1][at] = round_side(DType::kF16, s.minimum);
        }
    });
  }

  DecodePlan plan(const PlanQuery&) const override {
    DecodePlan plan = empty_plan();
    LevelsTerm term;
    term.offset = format_.offset;
    if (format_.code == code_iq4_nl) {
      const auto levels = ggml_iq4_nl_levels();
      term.levels.assign(levels.begin(), levels.end());
    }
    term.scale_side = 0;
    if (format_.minimum) term.zero_side = 1;
    term.group_channels = kBlock;
    plan.terms = {term};
    return plan;
  }

  int64_t constant_bytes(CountedBooks&) const override { return 0; }  // levels are the format's

  void save(ParameterWriter&) const override {}
  void load(const ParameterReader&) override {}

 private:
  Format format_;
  QueryForm query_;
  RopePlacement rope_;
  CodeLayout layout_;
};

MethodInfo describe_ggml() {
  MethodInfo info;
  info.name = "ggml";
  info.title = "llama.cpp's cache types: blocks of 32 channels of a token with a float16 scale";
  info.paper =
      "ggml-org/llama.cpp: ggml/src/ggml-quants.c; rotated, the presets rot-*, as its caches are since pull request "
      "21038 (2026)";
  info.family = "levels";
  info.bits = "type == q8_0 ? 8.5 : type == q5_1 ? 6 : type == q5_0 ? 5.5 : type == q4_1 ? 5 : 4.5";
  info.trained = false;
  info.caveat =
      "newer llama.cpp rotates where head_dim is a multiple of 64: q4_0 of an old build is q4_0 here, of a new one "
      "rot-q4_0. Its CPU path also rounds queries to q8_0 (q8_1 for q4_1 and q5_1), behind the rotation: with "
      "`k: {query: q8}` alone, and such rows are flagged quantized-query; exact keys (sinks, window) meet exact "
      "queries, and the sum of a q8_1 block is not rounded to float16 by itself. q8_0 follows the reference; vector "
      "units of ggml round ties to even. Two values as loud as each other with opposite signs make q4_0, q5_0 and "
      "iq4_nl jump. Scales beyond float16 saturate, where ggml's become infinite";
  info.presets = {{"default", {{"note", "q4_0 as it is, not rotated"}}}};
  for (const Format& f : kFormats) {
    info.presets[f.name] = {{"codec", {{"type", f.name}}}};
    const Json keys = {"hadamard"}, values = {{{"name", "hadamard"}, {"block", 64}}};
    info.presets[fmt::format("rot-{}", f.name)] = {
        {"codec", {{"type", f.name}, {"k", {{"transform", keys}}}, {"v", {{"transform", values}}}}},
        {"note", "keys rotated by the largest power of two that divides a head, values in blocks of 64"}};
  }
  return info;
}

std::string check_ggml(const GgmlKnobs& k, const UnitShape& unit) {
  if (unit.head_dim % kBlock != 0)
    return fmt::format("blocks of {} channels don't divide a head of {}", kBlock, unit.head_dim);
  if (k.query == "exact") return "";
  if (unit.role == Role::kValue) return "query: no query meets values; give it for k alone";
  if (unit.rope == RopePlacement::kPre)
    return "query: before RoPE a query is another for every key, and llama.cpp rounds one; keys after RoPE alone";
  return "";
}

}  // namespace

VQKV_DEFINE_METHOD(ggml, GgmlKnobs, GgmlCodec, describe_ggml, check_ggml)

}  // namespace vqkv
