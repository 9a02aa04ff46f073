#include "cache/policies/kinds.h"

#include <fmt/format.h>

#include "core/error.h"
#include "core/json.h"
#include "core/names.h"

namespace vqkv {

#define VQKV_POLICY(name) const PolicyKind& vqkv_policy_##name();
#include "cache/policies/policies.inc"
#undef VQKV_POLICY

const std::vector<const PolicyKind*>& all_policies() {
  static const std::vector<const PolicyKind*> kinds = {
#define VQKV_POLICY(name) &vqkv_policy_##name(),
#include "cache/policies/policies.inc"
#undef VQKV_POLICY
  };
  return kinds;
}

const PolicyKind& find_policy(const std::string& name, const std::string& path) {
  std::vector<std::string> names;
  for (const PolicyKind* k : all_policies()) {
    names.push_back(k->describe().name);
    if (names.back() == name) return *k;
  }
  fail_unknown(path.empty() ? "policy" : path + ": policy", name, names);
}

Json PolicyKind::canonical(const Json& given, const std::string& path) const {
  for (const auto& [key, value] : given.items())
    fail_usage(fmt::format("{}.{}: policy '{}' has no knobs", path, key, describe().name));
  return Json::object();
}

}  // namespace vqkv
