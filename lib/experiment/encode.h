// The codes that a frozen codec makes of a trace, in a file that other programs read: docs/formats.md.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "core/json.h"

namespace vqkv {

inline constexpr char kCodesFormat[] = "vqkv-codes";
inline constexpr int64_t kCodesVersion = 1;

struct EncodeOptions {
  std::string codecs, trace, out;
  std::vector<std::string> overrides;  // of trace.report, cache.sinks, cache.prompt and cache.exact_dtype
  Json provenance = Json::object();    // written as it is
  std::function<bool()> stop;
};

// Codes, side values and decoded rows of every unit in every window of the documents (trace.report; all of them), coded
// as a cache codes them, up to the window's last whole block. {windows, units, tokens}: how many windows there are, how
// many units were written in all of them, and how many tokens were coded. Null when `stop` said so.
// kUsage: a codec set of several tiers, or that sees the layer below; a cache that keeps no codes. kBadData: files that
// are not of one model.
Json encode(const EncodeOptions& options);

}  // namespace vqkv
