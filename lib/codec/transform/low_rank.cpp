// The leading principal axes of a unit's tokens: codes stand in `rank` of them, the rest of a token is its mean.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "codec/transform/symmetric.h"
#include "codec/transform/transform.h"
#include "core/error.h"
#include "core/thread_pool.h"

namespace vqkv {
namespace {

struct LowRankKnobs {
  int rank = 0;
  KnobTable table() {
    return KnobTable().integer("rank", &rank, 0, 65536, "axes kept of a unit, all its heads together; 0: half of them");
  }
};

int rank_of(const LowRankKnobs& k, const UnitShape& unit) { return k.rank != 0 ? k.rank : unit.channels() / 2; }

class LowRank final : public Transform {
 public:
  LowRank(const LowRankKnobs& knobs, const UnitShape& unit)
      : channels_(unit.channels()), rank_(rank_of(knobs, unit)), mean_(static_cast<size_t>(channels_), 0.0f) {
    axes_.assign(static_cast<size_t>(rank_) * static_cast<size_t>(channels_), 0.0f);
    for (int i = 0; i < rank_; ++i) axes_[static_cast<size_t>(i * channels_ + i)] = 1.0f;
  }

  UnitShape coded(const UnitShape& unit) const override {
    UnitShape out = unit;
    out.heads = 1;
    out.head_dim = rank_;
    out.rope_facts = RopeFacts::plain(rank_, 0, 1);  // an axis is no half of a RoPE pair
    return out;
  }

  void train(const TrainSet& set, const Rng&) override {
    const size_t n = mean_.size();
    std::vector<double> mean(n, 0.0);
    for (int64_t r = 0; r < set.x.rows; ++r)
      for (size_t c = 0; c < n; ++c) mean[c] += set.x(r, static_cast<int64_t>(c));
    for (size_t c = 0; c < n; ++c)
      mean_[c] = static_cast<float>(mean[c] / static_cast<double>(std::max<int64_t>(1, set.x.rows)));
    const SymmetricEigen e = symmetric_eigen(covariance(set.x, 0, channels_), channels_);
    for (size_t i = 0; i < static_cast<size_t>(rank_); ++i)
      for (size_t c = 0; c < n; ++c) axes_[i * n + c] = static_cast<float>(e.vectors[c * n + i]);
  }

  void forward(ConstMatrix x, MutMatrix y) const override {
    parallel_chunks(x.rows, 64, [&](int64_t first, int64_t end) {
      for (int64_t r = first; r < end; ++r)
        for (int i = 0; i < rank_; ++i) {
          const float* axis = axes_.data() + int64_t{i} * channels_;
          double sum = 0;
          for (int c = 0; c < channels_; ++c) sum += (double{x(r, c)} - mean_[static_cast<size_t>(c)]) * axis[c];
          y(r, i) = static_cast<float>(sum);
        }
    });
  }
  void inverse(LinearMap& map, std::vector<float>& bias) const override {
    map = DenseMap{rank_, channels_, axes_};  // the axes are orthonormal
    bias = mean_;
  }
  int mixed_channels() const override { return rank_; }
  bool commutes_with_rope() const override { return false; }
  void save(ParameterWriter& out, const std::string& prefix) const override {
    out.tensor(prefix + "axes", {rank_, channels_}, axes_.data());
    out.tensor(prefix + "mean", {channels_}, mean_.data());
  }
  void load(const ParameterReader& in, const std::string& prefix) override {
    const AlignedVector<float> axes = in.tensor(prefix + "axes", {rank_, channels_});
    const AlignedVector<float> mean = in.tensor(prefix + "mean", {channels_});
    for (const AlignedVector<float>* v : {&axes, &mean})
      for (const float f : *v)
        if (!std::isfinite(f)) fail_data(prefix + "axes, mean: must be finite");
    axes_.assign(axes.begin(), axes.end());
    mean_.assign(mean.begin(), mean.end());
  }

 private:
  int channels_, rank_;
  std::vector<float> mean_;  // (channels)
  std::vector<float> axes_;  // (rank, channels), orthonormal rows
};

TransformInfo describe_low_rank() {
  return {
      "low_rank",
      "keeps the leading principal axes of a unit about its mean",
      "the latent of Palu (Chang et al., ICLR 2025, arXiv 2407.21118), from the tokens instead of the weights",
      "axes of all heads of a unit together, as Palu's groups of heads: every head then reads all codes of the unit. "
      "Variance is not what queries look at: put query_metric before it for keys. The axes count as constants, "
      "4 bytes a number",
      "0",
      true,
      1,
      Json::object(),
      "(rank == 0 ? floor(channels / 2) : rank) / channels"};
}
std::string check_low_rank(const LowRankKnobs& k, const UnitShape& unit) {
  const int rank = rank_of(k, unit);
  return rank >= 1 && rank <= unit.channels() ? ""
                                              : fmt::format("{} axes of a unit of {} channels", rank, unit.channels());
}

}  // namespace

VQKV_DEFINE_TRANSFORM(low_rank, LowRankKnobs, LowRank, describe_low_rank, check_low_rank)

}  // namespace vqkv
