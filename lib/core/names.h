// One wording for a name that nobody registered, wherever it was written:
//   "codec 'rtm' is not known, did you mean 'rtn'?; allowed: exact, pq, rtn"
//   "cache: unknown key 'windw', did you mean 'window'?; allowed: sinks, window, flush"
#pragma once
#include <string>
#include <vector>

#include "core/error.h"

namespace vqkv {

// ", did you mean 'y'?" for the entry of `known` nearest to `name`; "" when nothing is near.
std::string did_you_mean(const std::string& name, const std::vector<std::string>& known);

// The whole sentence; `what` is what the name should have named ("codec") or the place with its colon ("codec.rope:").
std::string unknown_name(const std::string& what, const std::string& name, const std::vector<std::string>& known);

// kUsage with that sentence.
[[noreturn]] void fail_unknown(const std::string& what, const std::string& name, const std::vector<std::string>& known);
// kUsage: "`what`: 'name' stands twice".
void refuse_twice(const std::string& what, const std::vector<std::string>& names);
// kUsage for a key of the map at `path` that is none of `known`.
[[noreturn]] void fail_unknown_key(const std::string& path, const std::string& key,
                                   const std::vector<std::string>& known);

}  // namespace vqkv
