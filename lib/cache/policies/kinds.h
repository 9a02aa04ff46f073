// Policies of a cache: which tokens it keeps. `cache: {policy: streaming}` or `{policy: {name: ..., knobs}}`; one file
// each, registered by one line in policies.inc.
#pragma once
#include <string>
#include <vector>

#include "cache/policy.h"
#include "codec/knobs.h"
#include "core/json_fwd.h"

namespace vqkv {

struct PolicyInfo {
  std::string name, title;
  std::string paper;  // authors, venue, arXiv id
  std::string bits;   // a value of keys and values that a cache of T tokens holds, in the knobs' names
  std::string caveat;
  std::string assumed = "";  // what the source leaves open, and what was taken; empty: nothing
  int version = 1;           // raised when other tokens stay; part of the identity of cells under it
};

class PolicyKind {
 public:
  virtual ~PolicyKind() = default;
  virtual PolicyInfo describe() const = 0;
  virtual std::vector<Knob> knobs() const { return {}; }
  // Checks `knobs` (flat object) and completes it with defaults.
  virtual Json canonical(const Json& knobs, const std::string& path) const;
  // Makes a policy of its kind of `policy`, whose rules are read already. Error (usage): rules that don't go with it.
  virtual void apply(const Json& knobs, CachePolicy& policy) const = 0;
};

// By name, in the order of policies.inc. find throws kUsage with `path`, where the name was written, and the nearest
// name.
const std::vector<const PolicyKind*>& all_policies();
const PolicyKind& find_policy(const std::string& name, const std::string& path = "");

// A policy file ends with this; Kind is default-constructible.
#define VQKV_DEFINE_POLICY(name, Kind)             \
  const ::vqkv::PolicyKind& vqkv_policy_##name() { \
    static const Kind kind;                        \
    return kind;                                   \
  }

}  // namespace vqkv
