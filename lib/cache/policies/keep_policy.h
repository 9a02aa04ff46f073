// Which tokens a KV head keeps: the seam of eviction methods (H2O, SnapKV and their kin). Decisions name positions, per
// layer and KV head; the heads of a group share them, since they share the rows.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "cache/cache.h"

namespace vqkv {

enum class Keep : uint8_t {
  kKeep,
  kEvict,   // never attended again by this head; its page is freed once every head of the unit has let all of it go
  kDemote,  // to a cheaper form; refused (kUsage) by a cache whose body has one form only
};

struct KeepDecision {
  int64_t position = 0;
  Keep keep = Keep::kKeep;
};

class KeepPolicy {
 public:
  virtual ~KeepPolicy() = default;
  // After each block: mass[t] is the softmax probability that token t received, summed over the queries of the block
  // (the first at `first_position`) and the query heads of the group.
  virtual void observe(int layer, int kv_head, int64_t first_position, std::span<const double> mass) = 0;
  // Between blocks, for a cache of `length` tokens. Positions not named are kept.
  virtual std::vector<KeepDecision> decide(int layer, int kv_head, int64_t length) = 0;
};

// Asks `policy` for every layer and head and carries its decisions out.
void apply_keep_policy(KeepPolicy& policy, CompressedCache& cache);

}  // namespace vqkv
