// Random projections of which the signs alone are kept: what QJL codes keys with.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "codec/plan.h"
#include "core/view.h"

namespace vqkv {

// S (rows, width) beside its transpose, which encoding multiplies with. Immutable.
class SignSketch {
 public:
  // values: (rows, width), row-major.
  SignSketch(int width, AlignedVector<float> values);

  int rows() const { return static_cast<int>(values_->size()) / width_; }
  int width() const { return width_; }
  const std::shared_ptr<const AlignedVector<float>>& values() const { return values_; }

  // Signs of the first `count` rows of S x, as SignTerm packs them: a bit is set where its row is above 0.
  // x: (width); bytes: ((count + 7) / 8).
  void signs(const double* x, int count, uint16_t* bytes) const;
  // The term that decodes them without bias: sqrt(pi / 2) / count * scale * S^T sign(S x), scale being the norm of x
  // (baseline-methods 4.3; exactly so where S is Gaussian, 1 + 1/(4 width) times too much where it is orthogonal).
  SignTerm term(int count) const;

 private:
  int width_;
  std::shared_ptr<const AlignedVector<float>> values_;
  std::vector<float> across_;  // (width, rows)
};

// The sketch of this shape and seed, one for all that ask while it is alive. orthogonal: chunks of `width` rows are
// orthogonal, of length sqrt(width), each uniform over the sphere; otherwise all values are N(0, 1).
std::shared_ptr<const SignSketch> sign_sketch(int rows, int width, bool orthogonal, int seed);

}  // namespace vqkv
