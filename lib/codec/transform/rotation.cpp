// Rotation of each head onto the principal axes of its training tokens, strongest first.
#include "codec/transform/per_head.h"
#include "codec/transform/symmetric.h"

namespace vqkv {
namespace {

struct RotationKnobs {
  std::string kind = "pca";
  KnobTable table() { return KnobTable().choice("kind", &kind, {"pca"}, "how the rotation is found: eigenvectors of the covariance"); }
};

class Rotation final : public Transform {
 public:
  Rotation(const RotationKnobs&, const UnitShape& unit) : heads_(unit.heads), d_(unit.head_dim) {
    for (HeadMatrices* m : {&forward_, &back_}) {
      m->head_dim = d_;
      m->matrix.assign(static_cast<size_t>(heads_), AlignedVector<float>(static_cast<size_t>(d_) * static_cast<size_t>(d_), 0.0f));
      for (auto& block : m->matrix)
        for (int i = 0; i < d_; ++i) block[static_cast<size_t>(i) * static_cast<size_t>(d_ + 1)] = 1.0f;
    }
  }

  void train(const TrainSet& set, const Rng&) override {
    for (int h = 0; h < heads_; ++h) {
      const SymmetricEigen e = symmetric_eigen(covariance(set.x, int64_t{h} * d_, d_), d_);
      forward_.matrix[static_cast<size_t>(h)].assign(e.vectors.begin(), e.vectors.end());
    }
    transpose();
  }
  void forward(ConstMatrix x, MutMatrix y) const override { forward_.forward(x, y); }
  void inverse(LinearMap& map, std::vector<float>&) const override { map = back_.block_diagonal(); }
  int mixed_channels() const override { return d_; }
  bool commutes_with_rope() const override { return false; }
  void save(ParameterWriter& out, const std::string& prefix) const override { forward_.save(out, prefix + "rotation"); }
  void load(const ParameterReader& in, const std::string& prefix) override {
    forward_.load(in, prefix + "rotation", heads_, d_);
    transpose();
  }

 private:
  void transpose() {
    for (size_t h = 0; h < forward_.matrix.size(); ++h)
      for (int i = 0; i < d_; ++i)
        for (int j = 0; j < d_; ++j)
          back_.matrix[h][static_cast<size_t>(j * d_ + i)] = forward_.matrix[h][static_cast<size_t>(i * d_ + j)];
  }

  int heads_, d_;
  HeadMatrices forward_, back_;
};

TransformInfo describe_rotation() {
  return {"rotation", "rotates each head onto its principal axes", "",
          "gathers variance in the first channels: a product code then needs variance-ranked groups or it starves the first and wastes the last", "0"};
}
std::string check_rotation(const RotationKnobs&, const UnitShape&) { return ""; }

}  // namespace

VQKV_DEFINE_TRANSFORM(rotation, RotationKnobs, Rotation, describe_rotation, check_rotation)

}  // namespace vqkv
