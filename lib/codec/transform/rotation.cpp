// A learned rotation of each head: onto the principal axes of its training tokens, strongest first, or the one that
// suits a product code best (OPQ).
#include <fmt/format.h>

#include "codec/train/rotation.h"
#include "codec/transform/per_head.h"
#include "codec/transform/symmetric.h"

namespace vqkv {
namespace {

struct RotationKnobs {
  std::string kind = "pca";
  int groups = 16;
  int iterations = 20;
  KnobTable table() {
    return KnobTable()
        .choice("kind", &kind, {"pca", "opq"},
                "eigenvectors of the covariance, or the rotation that a product code loses least behind")
        .integer("groups", &groups, 1, 65536, "opq: sub-vectors of a head that the product code will have")
        .integer("iterations", &iterations, 1, 1000, "opq: alternations of rotation and codes")
        .effort();
  }
};

class Rotation final : public Transform {
 public:
  Rotation(const RotationKnobs& knobs, const UnitShape& unit) : knobs_(knobs), heads_(unit.heads), d_(unit.head_dim) {
    for (HeadMatrices* m : {&forward_, &back_}) {
      m->head_dim = d_;
      m->matrix.assign(static_cast<size_t>(heads_),
                       AlignedVector<float>(static_cast<size_t>(d_) * static_cast<size_t>(d_), 0.0f));
      for (auto& block : m->matrix)
        for (int i = 0; i < d_; ++i) block[static_cast<size_t>(i) * static_cast<size_t>(d_ + 1)] = 1.0f;
    }
  }

  void train(const TrainSet& set, const Rng& rng) override {
    for (int h = 0; h < heads_; ++h) {
      if (knobs_.kind == "opq") {
        const OpqOptions options{knobs_.groups, knobs_.iterations, OpqOptions{}.points};
        const Matrix<float> a =
            opq_rotation(set.x.slice_cols(int64_t{h} * d_, d_), options, rng.split(static_cast<uint64_t>(h)));
        back_.matrix[static_cast<size_t>(h)].assign(a.storage.begin(), a.storage.end());  // y = x A^T, so x = y A
        continue;
      }
      const SymmetricEigen e = symmetric_eigen(covariance(set.x, int64_t{h} * d_, d_), d_);
      forward_.matrix[static_cast<size_t>(h)].assign(e.vectors.begin(), e.vectors.end());
    }
    if (knobs_.kind == "opq")
      transpose(back_, forward_);
    else
      transpose(forward_, back_);
  }
  void forward(ConstMatrix x, MutMatrix y) const override { forward_.forward(x, y); }
  void inverse(LinearMap& map, std::vector<float>&) const override { map = back_.map(); }
  int mixed_channels() const override { return d_; }
  bool commutes_with_rope() const override { return false; }
  void save(ParameterWriter& out, const std::string& prefix) const override { forward_.save(out, prefix + "rotation"); }
  void load(const ParameterReader& in, const std::string& prefix) override {
    forward_.load(in, prefix + "rotation", heads_, d_);
    transpose(forward_, back_);
  }

 private:
  void transpose(const HeadMatrices& from, HeadMatrices& to) const {
    for (size_t h = 0; h < from.matrix.size(); ++h)
      for (int i = 0; i < d_; ++i)
        for (int j = 0; j < d_; ++j)
          to.matrix[h][static_cast<size_t>(j * d_ + i)] = from.matrix[h][static_cast<size_t>(i * d_ + j)];
  }

  RotationKnobs knobs_;
  int heads_, d_;
  HeadMatrices forward_, back_;
};

TransformInfo describe_rotation() {
  return {"rotation", "a learned rotation of each head",
          "kind opq: Ge, He, Ke, Sun, Optimized Product Quantization, TPAMI 2014",
          "pca gathers variance in the first channels: a product code then needs variance-ranked groups or it starves "
          "the first and wastes the last; "
          "opq serves a product code of as many sub-vectors a head as its groups",
          "0"};
}
std::string check_rotation(const RotationKnobs& k, const UnitShape& unit) {
  if (k.kind == "opq" && unit.head_dim % k.groups != 0)
    return fmt::format("{} sub-vectors don't divide a head of {}", k.groups, unit.head_dim);
  return "";
}

}  // namespace

VQKV_DEFINE_TRANSFORM(rotation, RotationKnobs, Rotation, describe_rotation, check_rotation)

}  // namespace vqkv
