// Codes keys in the metric of the queries that will read them: with F = Sq^(1/2) V, squared error after the transform
// is the expected squared error of a score (vq-methods r.5). Sq is the second moment of a KV head's queries, V the
// principal axes of the keys in that metric, strongest first. Pre-RoPE queries and keys meet at every relative angle,
// so there the metric is one weight a RoPE pair.
#include <algorithm>
#include <cmath>

#include "codec/transform/per_head.h"
#include "codec/transform/symmetric.h"
#include "core/error.h"

namespace vqkv {
namespace {

struct QueryMetricKnobs {
  double ridge = 1e-6;
  bool axes = true;
  KnobTable table() {
    return KnobTable()
        .real("ridge", &ridge, 0.0, 1.0, "added to the metric's diagonal, as a share of its mean")
        .boolean("axes", &axes, "post-RoPE: turn to the principal axes of the keys in the metric");
  }
  TrainNeeds needs() const { return {.moments = true}; }
};

class QueryMetric final : public Transform {
 public:
  QueryMetric(const QueryMetricKnobs& knobs, const UnitShape& unit)
      : knobs_(knobs), unit_(unit), heads_(unit.heads), d_(unit.head_dim), pairs_(unit.rope == RopePlacement::kPre) {
    scale_.assign(static_cast<size_t>(pairs_ ? unit.channels() : 0), 1.0f);
    if (pairs_) return;
    for (HeadMatrices* m : {&forward_, &back_}) {
      m->head_dim = d_;
      m->matrix.assign(static_cast<size_t>(heads_),
                       AlignedVector<float>(static_cast<size_t>(d_) * static_cast<size_t>(d_), 0.0f));
      for (auto& block : m->matrix)
        for (int i = 0; i < d_; ++i) block[static_cast<size_t>(i) * static_cast<size_t>(d_ + 1)] = 1.0f;
    }
  }

  void train(const TrainSet& set, const Rng&) override {
    if (pairs_)
      train_pairs(set);
    else
      train_heads(set);
  }

  void forward(ConstMatrix x, MutMatrix y) const override {
    if (!pairs_) {
      forward_.forward(x, y);
      return;
    }
    for (int64_t r = 0; r < x.rows; ++r)
      for (int64_t c = 0; c < x.cols; ++c) y(r, c) = x(r, c) / scale_[static_cast<size_t>(c)];
  }
  void inverse(LinearMap& map, std::vector<float>&) const override {
    if (pairs_)
      map = DiagonalMap{scale_};
    else
      map = back_.map();
  }
  int mixed_channels() const override { return pairs_ ? 1 : d_; }
  int64_t encoder_bytes() const override { return pairs_ ? 0 : int64_t{4} * heads_ * d_ * d_; }  // F beside its inverse
  bool commutes_with_rope() const override { return pairs_; }
  void save(ParameterWriter& out, const std::string& prefix) const override {
    if (pairs_) {
      out.tensor(prefix + "scale", {static_cast<int64_t>(scale_.size())}, scale_.data());
    } else {
      forward_.save(out, prefix + "forward");
      back_.save(out, prefix + "back");
    }
  }
  void load(const ParameterReader& in, const std::string& prefix) override {
    if (pairs_) {
      const AlignedVector<float> scale = in.tensor(prefix + "scale", {static_cast<int64_t>(scale_.size())});
      for (const float v : scale)
        if (!(std::isfinite(v) && v > 0)) fail_data(prefix + "scale: must be positive and finite");
      scale_.assign(scale.begin(), scale.end());
    } else {
      forward_.load(in, prefix + "forward", heads_, d_);
      back_.load(in, prefix + "back", heads_, d_);
    }
  }

 private:
  void train_pairs(const TrainSet& set) {
    if (set.query_pair_moment.size() != static_cast<size_t>(unit_.channels() / 2))
      fail_data(
          "query_metric: the training data hold no pre-RoPE moments of the queries (a transform before it may have "
          "mixed the pairs)");
    double mean = 0;
    for (const float w : set.query_pair_moment) mean += w;
    mean /= static_cast<double>(set.query_pair_moment.size());
    if (!(mean > 0)) mean = 1;
    for (size_t p = 0; p < set.query_pair_moment.size(); ++p) {
      const double w = std::sqrt(set.query_pair_moment[p] / mean + std::max(knobs_.ridge, 1e-12));
      const auto [a, b] = unit_.pair(static_cast<int>(p));
      scale_[static_cast<size_t>(a)] = scale_[static_cast<size_t>(b)] = static_cast<float>(1.0 / w);
    }
  }

  void train_heads(const TrainSet& set) {
    const auto d = static_cast<size_t>(d_);
    if (set.query_moment.rows != int64_t{heads_} * d_ || set.query_moment.cols != int64_t{heads_} * d_)
      fail_data("query_metric: the training data hold no second moment of the queries");
    double trace = 0;
    for (int64_t c = 0; c < set.query_moment.rows; ++c) trace += set.query_moment(c, c);
    // Mean weight 1 over the unit: transformed keys keep their magnitude, and codebooks their float16 range.
    const double unit = trace > 0 ? static_cast<double>(set.query_moment.rows) / trace : 1.0;
    for (int h = 0; h < heads_; ++h) {
      std::vector<double> metric(d * d);
      double own = 0;
      for (size_t i = 0; i < d; ++i) {
        for (size_t j = 0; j < d; ++j)
          metric[i * d + j] =
              unit * set.query_moment(h * d_ + static_cast<int64_t>(i), h * d_ + static_cast<int64_t>(j));
        own += metric[i * d + i];
      }
      const double ridge = std::max(knobs_.ridge, 1e-12) * (own > 0 ? own / static_cast<double>(d) : 1.0);
      for (size_t i = 0; i < d; ++i) metric[i * d + i] += ridge;
      const SymmetricEigen e = symmetric_eigen(metric, d_);
      std::vector<double> root(d * d, 0.0), inverse_root(d * d, 0.0);
      for (size_t i = 0; i < d; ++i)
        for (size_t j = 0; j < d; ++j)
          for (size_t l = 0; l < d; ++l) {
            const double s = std::sqrt(std::max(e.values[l], ridge)), uv = e.vectors[i * d + l] * e.vectors[j * d + l];
            root[i * d + j] += uv * s;
            inverse_root[i * d + j] += uv / s;
          }
      std::vector<double> axes(d * d, 0.0);
      if (knobs_.axes)
        axes = symmetric_eigen(product(product(root, covariance(set.x, int64_t{h} * d_, d_)), root), d_).vectors;
      else
        for (size_t i = 0; i < d; ++i) axes[i * d + i] = 1;
      const std::vector<double> f = product(root, axes), b = product(transposed(axes), inverse_root);
      forward_.matrix[static_cast<size_t>(h)].assign(f.begin(), f.end());
      back_.matrix[static_cast<size_t>(h)].assign(b.begin(), b.end());
    }
  }

  std::vector<double> product(const std::vector<double>& a, const std::vector<double>& b) const {
    const auto d = static_cast<size_t>(d_);
    std::vector<double> c(d * d, 0.0);
    for (size_t i = 0; i < d; ++i)
      for (size_t l = 0; l < d; ++l)
        for (size_t j = 0; j < d; ++j) c[i * d + j] += a[i * d + l] * b[l * d + j];
    return c;
  }
  std::vector<double> transposed(const std::vector<double>& a) const {
    const auto d = static_cast<size_t>(d_);
    std::vector<double> c(d * d);
    for (size_t i = 0; i < d; ++i)
      for (size_t j = 0; j < d; ++j) c[j * d + i] = a[i * d + j];
    return c;
  }

  QueryMetricKnobs knobs_;
  UnitShape unit_;
  int heads_, d_;
  bool pairs_;
  std::vector<float> scale_;     // pre-RoPE: 1 / sqrt(weight) a channel
  HeadMatrices forward_, back_;  // post-RoPE: F and its inverse
};

TransformInfo describe_query_metric() {
  return {
      "query_metric",
      "codes keys in the metric of their queries",
      "NOVA-KV, Spend Bits Where Queries Look, arXiv 2608.04074",
      "sorts channels by what queries look at, so contiguous groups of a product code are all strong or all weak: at "
      "2 bits 1.3 to 2 times the KLD of variance-ranked groups, which are the default behind it; makes channels "
      "unequal, so min-max codes of a token get worse by it. "
      "Post-RoPE moments depend on the positions trained on: train over the range that is tested",
      "0",
      true,
      1,
      {{"grouping", "variance"}}};
}
std::string check_query_metric(const QueryMetricKnobs&, const UnitShape& unit) {
  if (unit.role == Role::kValue) return "values meet no query; put it under codec.k";
  return unit.rope == RopePlacement::kPre && unit.head_dim % 2 != 0 ? "pairs need an even head_dim" : "";
}

}  // namespace

VQKV_DEFINE_TRANSFORM(query_metric, QueryMetricKnobs, QueryMetric, describe_query_metric, check_query_metric)

}  // namespace vqkv
