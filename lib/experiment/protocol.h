// The protocol of a row in words: which tokens were exact when a query looked. Rows compare only under one protocol.
#pragma once
#include <string>

#include "cache/policy.h"

namespace vqkv {

class CodecSet;

// "window 128, blocks of 64 + 4 sinks", "no exact token but its own", "keys: blocks of 128; values: window 129",
// "everything exact".
std::string protocol_text(const CachePolicy& policy);

// The same with what holds the coded tokens by age, where a canonical codec configuration has tiers: "..., 1,024 newest
// coded tokens rvq, older pq"; "..., older rvq at 2 stages". Tiers of one method say what differs: "..., 1,024 newest
// coded tokens rtn (bits 4), older rtn (bits 2)".
std::string protocol_text(const CachePolicy& policy, const Json& codec_config);

// "rvq at 2 stages"
std::string level_text(const std::string& method, int level);

// Why no query of a window of `tokens` tokens meets a code under a policy that codes: every number would be the exact
// cache's. "" where one does, and for a policy that codes nothing.
std::string codes_nothing(const CachePolicy& policy, int64_t tokens);

// Some codec's paper leaves tokens exact that the policy codes (MethodInfo::images_alone).
bool off_label(const CodecSet& codecs, const CachePolicy& policy);

// Some codec rounds the queries that meet its keys (DecodePlan::query), and the policy keeps codes.
bool quantizes_queries(const CodecSet& codecs, const CachePolicy& policy);

// The preset of a method of this canonical codec whose own cache rule the canonical `cache` is, as "kivi r32"; "" for a
// rule that no method of it published.
std::string published_policy(const Json& codec_config, const Json& cache_config);

// Both, for a row of a sweep: "keys: blocks of 128; values: window 129 (preset kivi default)". "" without a cache.
std::string protocol_of_cell(const Json& cell_config);

}  // namespace vqkv
