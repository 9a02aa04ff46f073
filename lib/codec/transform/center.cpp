// Subtracts the mean of each channel. For keys the mean adds one constant to all scores of a query where every token is
// centred; here exact tokens keep theirs, so decoding adds it back and nothing has to cancel.
#include <cmath>

#include "codec/transform/transform.h"
#include "core/error.h"

namespace vqkv {
namespace {

struct CenterKnobs {
  KnobTable table() { return {}; }
};

class Center final : public Transform {
 public:
  Center(const CenterKnobs&, const UnitShape& unit) : mean_(static_cast<size_t>(unit.channels()), 0.0f) {}

  void train(const TrainSet& set, const Rng&) override {
    std::vector<double> sum(mean_.size(), 0.0);
    for (int64_t r = 0; r < set.x.rows; ++r)
      for (size_t c = 0; c < sum.size(); ++c) sum[c] += set.x(r, static_cast<int64_t>(c));
    for (size_t c = 0; c < sum.size(); ++c)
      mean_[c] = set.x.rows ? static_cast<float>(sum[c] / static_cast<double>(set.x.rows)) : 0.0f;
  }
  void forward(ConstMatrix x, MutMatrix y) const override {
    for (int64_t r = 0; r < x.rows; ++r)
      for (int64_t c = 0; c < x.cols; ++c) y(r, c) = x(r, c) - mean_[static_cast<size_t>(c)];
  }
  void inverse(LinearMap&, std::vector<float>& bias) const override { bias = mean_; }
  bool commutes_with_rope() const override { return false; }
  void save(ParameterWriter& out, const std::string& prefix) const override {
    out.tensor(prefix + "mean", {static_cast<int64_t>(mean_.size())}, mean_.data());
  }
  void load(const ParameterReader& in, const std::string& prefix) override {
    const AlignedVector<float> mean = in.tensor(prefix + "mean", {static_cast<int64_t>(mean_.size())});
    for (const float v : mean)
      if (!std::isfinite(v)) fail_data(prefix + "mean: must be finite");
    mean_.assign(mean.begin(), mean.end());
  }

 private:
  std::vector<float> mean_;
};

TransformInfo describe_center() {
  return {"center", "subtracts the mean of each channel", "",
          "pre-RoPE keys of models with QKV bias have large means; without it min-max codes look better than codebooks",
          "0"};
}
std::string check_center(const CenterKnobs&, const UnitShape&) { return ""; }

}  // namespace

VQKV_DEFINE_TRANSFORM(center, CenterKnobs, Center, describe_center, check_center)

}  // namespace vqkv
