// One scale a token and group of channels, stored with the codes.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "codec/transform/transform.h"
#include "core/error.h"

namespace vqkv {
namespace {

struct TokenScaleKnobs {
  std::string by = "rms";
  std::string per = "unit";
  int width = 64;
  std::string type = "f16";
  KnobTable table() {
    return KnobTable()
        .choice("by", &by, {"rms", "absmax", "l2"}, "what the channels of a group are divided by")
        .choice("per", &per, {"unit", "head", "channels"},
                "channels that share a scale: the unit's, a head's, or runs of `width`")
        .integer("width", &width, 1, 65536, "channels of a run where per is channels")
        .choice("type", &type, {"f16", "bf16", "f32"}, "storage of a scale");
  }
};

class TokenScale final : public Transform {
 public:
  TokenScale(const TokenScaleKnobs& knobs, const UnitShape& unit)
      : knobs_(knobs),
        groups_(knobs.per == "unit"   ? 1
                : knobs.per == "head" ? unit.heads
                                      : unit.channels() / knobs.width),
        per_whole_heads_(unit.channels() / groups_ % unit.head_dim == 0) {}

  void train(const TrainSet&, const Rng&) override {}
  void forward(ConstMatrix, MutMatrix) const override { fail_internal("a token scale is applied by its chain"); }
  void inverse(LinearMap&, std::vector<float>&) const override {
    fail_internal("a token scale is undone by its chain");
  }
  bool is_token_scale() const override { return true; }
  int scale_groups() const override { return groups_; }
  DType scale_type() const override { return dtype_from_name(knobs_.type); }
  void scales(ConstMatrix x, MutMatrix out) const override {
    const int64_t width = x.cols / groups_;
    for (int64_t r = 0; r < x.rows; ++r)
      for (int64_t g = 0; g < groups_; ++g) {
        double sum = 0, most = 0;
        for (int64_t c = g * width; c < (g + 1) * width; ++c) {
          const double v = x(r, c);
          sum += v * v;
          most = std::max(most, std::abs(v));
        }
        const double s =
            knobs_.by == "absmax" ? most : std::sqrt(knobs_.by == "rms" ? sum / static_cast<double>(width) : sum);
        out(r, g) = static_cast<float>(std::min(s, 3.4e38));
      }
  }
  bool commutes_with_rope() const override { return per_whole_heads_; }
  void save(ParameterWriter&, const std::string&) const override {}
  void load(const ParameterReader&, const std::string&) override {}

 private:
  TokenScaleKnobs knobs_;
  int groups_;
  bool per_whole_heads_;
};

TransformInfo describe_token_scale() {
  return {"token_scale",
          "divides each token by its magnitude, which is stored with the codes",
          "",
          "nearly redundant after q/k normalisation; at head_dim 64 a scale a head costs 0.25 bits a value",
          "(type == f32 ? 32 : 16) / (per == unit ? channels : per == head ? head_dim : width)",
          false};
}
std::string check_token_scale(const TokenScaleKnobs& k, const UnitShape& unit) {
  if (k.per == "channels" && unit.channels() % k.width != 0)
    return fmt::format("runs of {} channels don't divide a unit of {}", k.width, unit.channels());
  return "";
}

}  // namespace

VQKV_DEFINE_TRANSFORM(token_scale, TokenScaleKnobs, TokenScale, describe_token_scale, check_token_scale)

}  // namespace vqkv
