// Sinks and a window, nothing between: what a window alone does. Boundaries are those of the rule `window`, so the row
// stands beside codecs under the same rule as if they had coded nothing.
#include "cache/policies/kinds.h"
#include "config/config.h"
#include "core/error.h"
#include "core/json.h"

namespace vqkv {
namespace {

class Streaming final : public PolicyKind {
 public:
  PolicyInfo describe() const override {
    return {.name = "streaming",
            .title = "sinks and the window alone: what leaves the window is gone",
            .paper = "Xiao et al., ICLR 2024, arXiv 2309.17453",
            .bits = "16 (sinks + window) / T",
            .caveat = "keeps the positions of the text, where the paper numbers the kept tokens anew"};
  }
  void apply(const Json&, CachePolicy& policy) const override {
    if (!policy.codes) fail_usage("cache.policy: streaming needs a window; rule 'none' keeps everything");
    if (policy.k.window != policy.v.window || policy.k.flush != policy.v.flush)
      fail_usage("cache.policy: streaming drops keys and values together; cache.k and cache.v must have one rule");
    if (policy.k.window < 1)
      fail_expected("cache.window", "1 or more with policy streaming, as a query sees itself", policy.k.window);
    if (policy.prompt > 0) fail_usage("cache.prompt: streaming codes nothing, neither a prompt nor what follows");
    policy.drops = true;
  }
};

}  // namespace

VQKV_DEFINE_POLICY(streaming, Streaming)

}  // namespace vqkv
