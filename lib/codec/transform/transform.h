// Transforms: maps composed before a codec, in the order of the configuration: `transform: [center, query_metric, hadamard]`.
// Affine ones fold into the plan's bias and map; the token scale becomes the plan's token scale (at most one in a chain).
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "codec/codec.h"

namespace vqkv {

class Transform {
 public:
  virtual ~Transform() = default;
  // Learns from rows already transformed by its predecessors (set.x); moments and queries are those of the unit,
  // carried through the predecessors by `carry`.
  virtual void train(const TrainSet& set, const Rng& rng) = 0;
  // x (n, in) -> y (n, out).
  virtual int out_channels(int in_channels) const { return in_channels; }
  virtual void forward(ConstMatrix x, MutMatrix y) const = 0;
  // Decode side, affine: x = y * map + bias. Identity parts stay empty. Not called for the token scale.
  virtual void inverse(LinearMap& map, std::vector<float>& bias) const = 0;
  virtual bool is_token_scale() const { return false; }
  virtual int scale_groups() const { return 1; }   // token scale: scalars a token
  virtual void scales(ConstMatrix, MutMatrix) const {}  // token scale: (n, groups), before rounding to storage
  virtual bool commutes_with_rope() const = 0;
  virtual void save(ParameterWriter& out, const std::string& prefix) const = 0;
  virtual void load(const ParameterReader& in, const std::string& prefix) = 0;
};

struct TransformInfo {
  std::string name, title, paper, caveat;
  std::string side_bits;  // formula; "0" for affine ones
};

class TransformKind {
 public:
  virtual ~TransformKind() = default;
  virtual TransformInfo describe() const = 0;
  virtual std::vector<Knob> knobs() const = 0;
  virtual Json canonical(const Json& knobs, const std::string& path) const = 0;
  virtual std::string check(const Json& knobs, const UnitShape& unit) const = 0;
  virtual std::unique_ptr<Transform> make(const Json& knobs, const UnitShape& unit) const = 0;
};

const std::vector<const TransformKind*>& all_transforms();
const TransformKind& find_transform(const std::string& name);

// A codec behind a chain of transforms; itself a Codec. An empty chain returns `inner` unchanged.
std::unique_ptr<Codec> with_transforms(std::vector<std::unique_ptr<Transform>> chain, std::unique_ptr<Codec> inner,
                                       const UnitShape& unit);

}  // namespace vqkv
