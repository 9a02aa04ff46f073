// What caches and generation offer, as both tools list it.
#pragma once
#include <span>
#include <string>

#include "common/table.h"

namespace vqkv {

struct RuleInfo {
  const char *name, *title, *knobs, *source;
};
// The rules of `cache.rule`; cache/policy.h holds their arithmetic.
std::span<const RuleInfo> cache_rules();

// Rules say when tokens are coded (cache.rule), policies which tokens stay (cache.policy): every cache has one of each.
Table rules_table();
Table policies_table();
Table backends_table();
Table strategies_table();  // of decoding
Table shapes_table();      // of `memory --shape`

}  // namespace vqkv
