// Small configurations of the registered methods.
#pragma once
#include <string>

#include "config/config.h"
#include "support/catch.h"

namespace vqkv::test {

// `codec:` of configs/codecs/METHOD.yaml with its group `test`.
inline Json test_config(const std::string& method) {
  Config config = load_config(std::string(VQKV_SOURCE_DIR) + "/configs/codecs/" + method + ".yaml");
  config.tree["group"] = "test";
  apply_group(config);
  REQUIRE(config.tree["codec"]["name"] == method);
  return config.tree["codec"];
}

// Where keys are coded: in the role's own group, which wins over what the file says.
inline void set_rope(Json& config, const std::string& rope) { config["k"]["rope"] = rope; }

}  // namespace vqkv::test
