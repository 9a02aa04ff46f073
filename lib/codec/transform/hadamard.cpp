// Orthonormal Walsh-Hadamard rotation of each head, in blocks of a power of two, after optional random signs.
#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>

#include "codec/transform/transform.h"
#include "core/rng.h"

namespace vqkv {
namespace {

struct HadamardKnobs {
  int block = 0;
  bool signs = false;
  int seed = 0;
  KnobTable table() {
    return KnobTable()
        .integer("block", &block, 0, 65536, "channels of a block, a power of two; 0: the largest that divides a head")
        .boolean("signs", &signs, "flip random channels first (randomised Hadamard)")
        .integer("seed", &seed, 0, 2147483647, "stream of the signs");
  }
};

int block_of(const HadamardKnobs& k, const UnitShape& unit) {
  return k.block != 0 ? k.block : 1 << std::countr_zero(static_cast<unsigned>(unit.head_dim));
}

class Hadamard final : public Transform {
 public:
  Hadamard(const HadamardKnobs& knobs, const UnitShape& unit)
      : channels_(unit.channels()), block_(block_of(knobs, unit)) {
    if (!knobs.signs) return;
    // The same signs in every unit: they are part of the method, not of its training.
    Rng rng = Rng::from_text(fmt::format("hadamard/{}", knobs.seed));
    for (int c = 0; c < channels_; ++c) sign_.push_back(rng.next_u32() & 1 ? -1.0f : 1.0f);
  }

  void train(const TrainSet&, const Rng&) override {}
  void forward(ConstMatrix x, MutMatrix y) const override {
    for (int64_t r = 0; r < x.rows; ++r) {
      for (int64_t c = 0; c < x.cols; ++c) y(r, c) = sign_.empty() ? x(r, c) : x(r, c) * sign_[static_cast<size_t>(c)];
      for (int64_t c = 0; c < x.cols; c += block_) walsh_hadamard(y.row(r) + c, block_);
    }
  }
  void inverse(LinearMap& map, std::vector<float>&) const override { map = HadamardMap{channels_, block_, {}, sign_}; }
  int mixed_channels() const override { return block_; }
  bool only_signs() const override { return true; }
  bool commutes_with_rope() const override { return false; }
  void save(ParameterWriter&, const std::string&) const override {}
  void load(const ParameterReader&, const std::string&) override {}

 private:
  int channels_, block_;
  std::vector<float> sign_;  // empty: none
};

TransformInfo describe_hadamard() {
  return {"hadamard",
          "orthonormal Walsh-Hadamard rotation of each head",
          "QuaRot (Ashkboos et al., NeurIPS 2024, arXiv 2404.00456), section on the KV cache",
          "spreads outlier channels, which also flattens the structure that per-channel codes and codebooks use",
          "0",
          false};
}
std::string check_hadamard(const HadamardKnobs& k, const UnitShape& unit) {
  const int block = block_of(k, unit);
  if (!std::has_single_bit(static_cast<unsigned>(block)))
    return fmt::format("blocks of {} channels are not a power of two", block);
  if (unit.head_dim % block != 0)
    return fmt::format("blocks of {} channels don't divide a head of {}", block, unit.head_dim);
  return "";
}

}  // namespace

VQKV_DEFINE_TRANSFORM(hadamard, HadamardKnobs, Hadamard, describe_hadamard, check_hadamard)

}  // namespace vqkv
