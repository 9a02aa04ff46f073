#include "cache/policies/keep_policy.h"

#include <fmt/format.h>

#include "core/error.h"

namespace vqkv {

void apply_keep_policy(KeepPolicy& policy, CompressedCache& cache) {
  for (int layer = 0; layer < cache.shape().layers; ++layer) {
    for (int head = 0; head < cache.shape().kv_heads; ++head) {
      std::vector<int64_t> gone;
      for (const KeepDecision& d : policy.decide(layer, head, cache.length())) {
        if (d.keep == Keep::kEvict) gone.push_back(d.position);
        if (d.keep == Keep::kDemote)
          fail_usage(fmt::format(
              "layer {}, KV head {}, position {}: this cache keeps its coded body in one form; nothing to demote to",
              layer, head, d.position));
      }
      cache.evict(layer, head, gone);
    }
  }
}

}  // namespace vqkv
