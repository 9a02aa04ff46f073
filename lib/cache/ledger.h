// The byte ledger: the bytes claimed are the bytes allocated.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory_resource>
#include <string>

#include "core/json_fwd.h"

namespace vqkv {

// Bytes of one sequence's cache by kind. All computed from layouts; total_sequence() equals what a counting memory
// resource saw, exactly.
struct ByteLedger {
  int64_t codes = 0;    // packed integer fields
  int64_t side = 0;     // scales, zeros, norms; parameters fitted to the prompt
  int64_t overlay = 0;  // exact exceptions, and a pointer to them for every token of a unit that may have some
  int64_t sinks = 0;    // exact first tokens
  int64_t window = 0;   // exact recent tokens, as held now
  int64_t padding = 0;  // allocated but unused: page tails, growth of exact buffers
  int64_t index = 0;    // page tables, explicit positions
  // Plans and decoders fitted to the prompt, and the queries that some are still to be fitted to; what a policy sums
  // up. In Sequence::bytes also what attention keeps between blocks for the sequence: rotated queries and, of a backend
  // of its own, rotation and lookup tables and partial sums. In none: what a shared backend keeps
  // (AttentionBackend::held_bytes), and what threads work in (attention_scratch_bytes).
  int64_t workspace = 0;
  int64_t codebooks = 0;  // model-side constants, shared by sequences; not part of total_sequence()
  int64_t total_sequence() const { return codes + side + overlay + sinks + window + padding + index + workspace; }
  Json to_json() const;
  static ByteLedger from_json(const Json& ledger);
};

// Error (internal, with `what` and the kind of bytes): the ledger of a cache is not what its allocator holds, or not
// what ledger_at gave for as many tokens. The formula can't know exceptions, their room to grow, and what was fitted to
// the prompt: where the cache holds such, it is held to the rest.
void require_equal(const ByteLedger& formula, const ByteLedger& held, int64_t allocated, const std::string& what);

// Owns every byte of a cache: forwards to an upstream resource and counts.
class CountingResource final : public std::pmr::memory_resource {
 public:
  explicit CountingResource(std::pmr::memory_resource* upstream = std::pmr::new_delete_resource())
      : upstream_(upstream) {}
  int64_t live() const { return live_; }
  int64_t peak() const { return peak_; }
  // Counts bytes that a sequence owns elsewhere; negative when they go.
  void charge(int64_t bytes);

 private:
  void* do_allocate(size_t bytes, size_t alignment) override;
  void do_deallocate(void* p, size_t bytes, size_t alignment) override;
  bool do_is_equal(const memory_resource& other) const noexcept override { return this == &other; }
  std::pmr::memory_resource* upstream_;
  std::atomic<int64_t> live_{0}, peak_{0};
};

}  // namespace vqkv
