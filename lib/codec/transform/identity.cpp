#include <algorithm>

#include "codec/transform/transform.h"

namespace vqkv {
namespace {

struct IdentityKnobs {
  KnobTable table() { return {}; }
};

class Identity final : public Transform {
 public:
  Identity(const IdentityKnobs&, const UnitShape&) {}
  void train(const TrainSet&, const Rng&) override {}
  void forward(ConstMatrix x, MutMatrix y) const override {
    for (int64_t r = 0; r < x.rows; ++r) std::copy_n(x.row(r), x.cols, y.row(r));
  }
  void inverse(LinearMap&, std::vector<float>&) const override {}
  bool only_signs() const override { return true; }
  bool commutes_with_rope() const override { return true; }
  void save(ParameterWriter&, const std::string&) const override {}
  void load(const ParameterReader&, const std::string&) override {}
};

TransformInfo describe_identity() {
  return {"identity", "changes nothing: the baseline of a sweep over transforms", "", "", "0", false};
}
std::string check_identity(const IdentityKnobs&, const UnitShape&) { return ""; }

}  // namespace

VQKV_DEFINE_TRANSFORM(identity, IdentityKnobs, Identity, describe_identity, check_identity)

}  // namespace vqkv
