#include <algorithm>
#include <cmath>

#include "codec/transform/transform.h"
#include "core/error.h"

namespace vqkv {
namespace {

struct ChannelScaleKnobs {
  std::string by = "std";
  KnobTable table() {
    return KnobTable().choice("by", &by, {"std", "absmax"},
                              "what each channel is divided by: its standard deviation or its largest magnitude");
  }
};

class ChannelScale final : public Transform {
 public:
  ChannelScale(const ChannelScaleKnobs& knobs, const UnitShape& unit)
      : knobs_(knobs), scale_(static_cast<size_t>(unit.channels()), 1.0f) {}

  void train(const TrainSet& set, const Rng&) override {
    const auto n = static_cast<double>(set.x.rows);
    for (size_t c = 0; c < scale_.size(); ++c) {
      double sum = 0, square = 0, most = 0;
      for (int64_t r = 0; r < set.x.rows; ++r) sum += set.x(r, static_cast<int64_t>(c));
      const double mean = n > 0 ? sum / n : 0;
      for (int64_t r = 0; r < set.x.rows; ++r) {
        const double v = set.x(r, static_cast<int64_t>(c));
        square += (v - mean) * (v - mean);
        most = std::max(most, std::abs(v));
      }
      const double s = knobs_.by == "std" ? (n > 0 ? std::sqrt(square / n) : 0) : most;
      scale_[c] = s > 1e-12 ? static_cast<float>(s) : 1.0f;  // a constant channel keeps its values
    }
  }
  void forward(ConstMatrix x, MutMatrix y) const override {
    for (int64_t r = 0; r < x.rows; ++r)
      for (int64_t c = 0; c < x.cols; ++c) y(r, c) = x(r, c) / scale_[static_cast<size_t>(c)];
  }
  void inverse(LinearMap& map, std::vector<float>&) const override { map = DiagonalMap{scale_}; }
  bool commutes_with_rope() const override { return false; }
  void save(ParameterWriter& out, const std::string& prefix) const override {
    out.tensor(prefix + "scale", {static_cast<int64_t>(scale_.size())}, scale_.data());
  }
  void load(const ParameterReader& in, const std::string& prefix) override {
    const AlignedVector<float> scale = in.tensor(prefix + "scale", {static_cast<int64_t>(scale_.size())});
    for (const float v : scale)
      if (!(std::isfinite(v) && v > 0)) fail_data(prefix + "scale: must be positive and finite");
    scale_.assign(scale.begin(), scale.end());
  }

 private:
  ChannelScaleKnobs knobs_;
  std::vector<float> scale_;
};

TransformInfo describe_channel_scale() {
  return {"channel_scale", "divides each channel by its spread over the training tokens", "",
          "equalises channels for a codebook, which also makes quiet channels as costly as loud ones: pair it with a "
          "query metric or judge by attention",
          "0"};
}
std::string check_channel_scale(const ChannelScaleKnobs&, const UnitShape&) { return ""; }

}  // namespace

VQKV_DEFINE_TRANSFORM(channel_scale, ChannelScaleKnobs, ChannelScale, describe_channel_scale, check_channel_scale)

}  // namespace vqkv
