// The store of one sequence: bytes in host memory, by the addresses that its map holds.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory_resource>

#include "cache/ledger.h"
#include "cache/map.h"

namespace vqkv {

class HostStore {
 public:
  explicit HostStore(std::pmr::memory_resource* memory) : memory_(memory) {}
  // Zeroed.
  BlockAddress allocate(int64_t bytes);
  void release(BlockAddress block, int64_t bytes);
  static std::byte* at(BlockAddress block) { return reinterpret_cast<std::byte*>(block); }
  // Bytes that the sequence owns outside the resource (objects of codecs): counted where the resource counts, negative
  // when they go.
  void charge(int64_t bytes);

 private:
  std::pmr::memory_resource* memory_;
};

// Exact rows of a head from `first_token` on, narrowed to the policy's exact_dtype. Error (data): a value leaves it.
void store_exact(const SequenceMap& map, int layer, Role role, int head, ConstMatrix rows, int64_t first_token);
// Tokens [first, first + count) of a head, none of them coded away, widened. Keys come transposed:
// out[channel * stride + i]; values as rows: out[i * stride + channel].
void load_exact_keys(const SequenceMap& map, int layer, int head, int64_t first, int64_t count, float* out,
                     int64_t stride);
void load_exact_values(const SequenceMap& map, int layer, int head, int64_t first, int64_t count, float* out,
                       int64_t stride);

}  // namespace vqkv
