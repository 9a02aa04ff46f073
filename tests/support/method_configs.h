// Small configurations of the registered methods.
#pragma once
#include <string>
#include <vector>

#include "codec/codec_set.h"
#include "codec/transform/transform.h"
#include "config/config.h"
#include "support/cache_shape.h"
#include "support/catch.h"

namespace vqkv::test {

// `codec:` of configs/codecs/METHOD.yaml with its group `test`, or another.
inline Json test_config(const std::string& method, const std::string& group = "test") {
  Config config = load_config(std::string(VQKV_SOURCE_DIR) + "/configs/codecs/" + method + ".yaml");
  config.tree["group"] = group;
  apply_group(config);
  REQUIRE(config.tree["codec"]["name"] == method);
  return config.tree["codec"];
}

// The groups of configs/codecs/METHOD.yaml whose names begin with "test": forms of its codes.
inline std::vector<std::string> test_groups(const std::string& method) {
  const Config config = load_config(std::string(VQKV_SOURCE_DIR) + "/configs/codecs/" + method + ".yaml");
  std::vector<std::string> out;
  for (const auto& [name, values] : config.tree["groups"].items())
    if (name.starts_with("test")) out.push_back(name);
  return out;
}

// A chain that the method stands behind in both roles: exact exceptions are refused behind what mixes channels.
inline Json chain_of(const std::string& method) {
  for (const UnitSpec& spec : resolve_codec(test_config(method), make_shape(1, 3, 1, 64)).units)
    if (make_codec(spec)->layout().overlay) return Json::array({"center", "channel_scale"});
  return Json::array({"center", "hadamard", "channel_scale"});
}

// A transform of a quarter of the channels where it drops some, so that codes of most widths divide what is left.
inline Json test_transform(const std::string& name) {
  for (const Knob& knob : find_transform(name).knobs())
    if (knob.name == "ratio") return {{"name", name}, {"ratio", 0.25}};
  return {{"name", name}};
}

// Whether it goes with the role and the placement at all: values meet no query.
inline bool takes(const TransformKind& kind, Role role, const std::string& rope = "post") {
  UnitShape unit;
  unit.role = role;
  unit.head_dim = 64;
  unit.rope = rope == "pre" ? RopePlacement::kPre : RopePlacement::kPost;
  return kind.check(kind.canonical(Json::object(), "transform"), unit).empty();
}

// Where keys are coded: in the role's own group, which wins over what the file says.
inline void set_rope(Json& config, const std::string& rope) { config["k"]["rope"] = rope; }

}  // namespace vqkv::test
