// Transforms: maps composed before a codec, in the order of the configuration: `transform: [center, query_metric,
// hadamard]`. Affine ones fold into the plan's bias and map; the token scale becomes the plan's token scale (at most
// one in a chain).
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "codec/codec.h"

namespace vqkv {

class Transform {
 public:
  virtual ~Transform() = default;
  // Learns from rows already transformed by its predecessors (set.x); moments, queries and W_O are carried through the
  // predecessors too, so that q'.k' differs from q.k by a constant of the query and W' v' likewise.
  virtual void train(const TrainSet& set, const Rng& rng) = 0;
  // Parameters of one prompt, as Codec::fit_needs and Codec::fit: x are rows of its own role, q queries, both behind
  // the transforms before it; q is empty where it asks for none, for values, and where x are train rows, as which what
  // stands behind it learns. What comes back stands in this one's
  // place for that sequence, with the same coded() and mixed_channels(). Null: nothing is fitted.
  virtual FitNeeds fit_needs() const { return {}; }
  virtual std::unique_ptr<Transform> fit(ConstMatrix, ConstMatrix) const { return nullptr; }
  virtual int64_t fitted_bytes() const { return 0; }  // what a sequence stores of a fitted one
  // The unit as what stands behind it sees it: other heads or channels where the transform changes the width.
  virtual UnitShape coded(const UnitShape& unit) const { return unit; }
  // x (n, channels) -> y (n, coded channels).
  virtual void forward(ConstMatrix x, MutMatrix y) const = 0;
  // Decode side, affine: x = y * map + bias, map (coded channels, channels). Parts that do nothing stay as they come.
  // Not called for the token scale, for which the chain divides by scales(x) after rounding them to scale_type();
  // forward is not called for it either.
  virtual void inverse(LinearMap& map, std::vector<float>& bias) const = 0;
  virtual bool is_token_scale() const { return false; }
  virtual int scale_groups() const { return 1; }        // token scale: scalars a token
  virtual void scales(ConstMatrix, MutMatrix) const {}  // token scale: (n, groups), before rounding to storage
  virtual DType scale_type() const { return DType::kF16; }
  // Runs of this many coded channels are mixed by the map; 1: none (diagonal). A token scale behind it must cover whole
  // runs.
  virtual int mixed_channels() const { return 1; }
  virtual bool only_signs() const { return false; }    // its map is IdentityMap, or a HadamardMap of signs alone
  virtual int64_t encoder_bytes() const { return 0; }  // constants that only encoding needs
  virtual bool commutes_with_rope() const = 0;
  virtual void save(ParameterWriter& out, const std::string& prefix) const = 0;
  virtual void load(const ParameterReader& in, const std::string& prefix) = 0;
};

struct TransformInfo {
  std::string name, title, paper, caveat;
  std::string side_bits;  // formula (see MethodInfo::bits); "0" for affine ones
  bool trained = true;    // false: learns nothing
  int version = 1;        // raised when results change; part of a cell's identity
  // Knobs that the method behind it should have, as {grouping: variance}: its defaults where it has such knobs.
  Json suits = Json::object();
  std::string width = "1";   // coded channels over the unit's: a formula like side_bits
  std::string assumed = "";  // what the source leaves open, and what was taken; empty: nothing
};

class TransformKind {
 public:
  virtual ~TransformKind() = default;
  virtual TransformInfo describe() const = 0;
  virtual std::vector<Knob> knobs() const = 0;
  virtual Json canonical(const Json& knobs, const std::string& path) const = 0;
  virtual std::string check(const Json& knobs, const UnitShape& unit) const = 0;
  virtual TrainNeeds needs(const Json& knobs) const = 0;  // with the transform's own name left out of `knobs`
  virtual std::unique_ptr<Transform> make(const Json& knobs, const UnitShape& unit) const = 0;
};

// By name, in the order of transforms.inc. find throws kUsage with `path`, where the name was written, and the nearest
// name.
const std::vector<const TransformKind*>& all_transforms();
const TransformKind& find_transform(const std::string& name, const std::string& path = "");

// The unit as seen behind a chain, and what the chain does to it.
struct ChainShape {
  UnitShape unit;
  int mixed = 1;        // runs of this many of its channels are mixed
  bool scaled = false;  // by a token scale
  bool rotated = true;  // by one Hadamard matrix at most, and nothing else
  void follow(const Transform& t);
};

// Canonical transforms [{name, ...}], each made for the unit as it sees it. kUsage where check_chain has a reason.
std::vector<std::unique_ptr<Transform>> make_chain(const Json& transforms, const UnitShape& unit,
                                                   ChainShape* behind = nullptr);

// A reason why they can't be made or composed for this unit (two token scales, say), or "".
std::string check_chain(const Json& transforms, const UnitShape& unit, ChainShape* behind = nullptr);

// Likewise for the codec behind them. A codec that scales tokens itself names that side "token_scale".
std::string check_inner(const ChainShape& behind, const UnitShape& unit, const Codec& inner);

// A codec behind a chain of transforms; itself a Codec. An empty chain returns `inner` unchanged.
std::unique_ptr<Codec> with_transforms(std::vector<std::unique_ptr<Transform>> chain, std::unique_ptr<Codec> inner,
                                       const UnitShape& unit);

// A transform file defines `struct XKnobs { ...; KnobTable table(); }`, its Transform, and ends with
//   VQKV_DEFINE_TRANSFORM(x, XKnobs, XTransform, describe_x, check_x)
// where XTransform is constructible from (const XKnobs&, const UnitShape&); transforms.inc holds one line per
// transform.
template <class Knobs, class TransformType>
class TransformOf final : public TransformKind {
 public:
  using Describe = TransformInfo (*)();
  using Check = std::string (*)(const Knobs&, const UnitShape&);
  TransformOf(Describe describe_transform, Check check_transform)
      : describe_(describe_transform), check_(check_transform) {}
  TransformInfo describe() const override { return describe_(); }
  std::vector<Knob> knobs() const override { return default_knobs<Knobs>(); }
  Json canonical(const Json& knobs, const std::string& path) const override {
    Knobs k;
    KnobTable table = k.table();
    table.apply(knobs, path);
    return table.values();
  }
  std::string check(const Json& knobs, const UnitShape& unit) const override { return check_(parse(knobs), unit); }
  TrainNeeds needs(const Json& knobs) const override { return needs_of(parse(knobs), describe_().trained); }
  std::unique_ptr<Transform> make(const Json& knobs, const UnitShape& unit) const override {
    return std::make_unique<TransformType>(parse(knobs), unit);
  }

 private:
  static Knobs parse(const Json& values) {
    Knobs k;
    k.table().apply(values, "transform");
    return k;
  }
  Describe describe_;
  Check check_;
};

#define VQKV_DEFINE_TRANSFORM(name, KnobsType, TransformType, describe, check)        \
  const ::vqkv::TransformKind& vqkv_transform_##name() {                              \
    static const ::vqkv::TransformOf<KnobsType, TransformType> kind(describe, check); \
    return kind;                                                                      \
  }

}  // namespace vqkv
