// One role of a codec's configuration, as JSON: what the canonical form and the plan of units share.
#pragma once
#include <set>
#include <string>

#include "codec/codec.h"

namespace vqkv::codec_config {

// Keys that belong to the unit, not to the method.
const std::set<std::string>& unit_keys();
// `from`'s keys over `into`; naming another method drops the knobs gathered so far.
void merge_keys(Json& into, const Json& from);
// `given` (one role's keys, unchecked) over the preset that it names or the method's default.
Json over_preset(Json given, Role role, const std::string& path);
// Takes away what a complete role got from its transforms, where `set` brings others: their defaults hold then.
void forget_suited(Json& role, const Json& set);
// One role, checked and complete.
Json canonical_role(const Json& raw, Role role, const std::string& path);
// Where a tier stands: "codec.tiers[1]".
std::string tier_path(size_t tier);

}  // namespace vqkv::codec_config
