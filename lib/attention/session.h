// KvSession: what a model calls to attend over one sequence's cache, whatever device that lies on.
#pragma once
#include <memory>
#include <memory_resource>
#include <string>

#include "attention/attention.h"

namespace vqkv {

class KvSession {
 public:
  virtual ~KvSession() = default;
  // Where the matrices of attend() lie: "cpu". A runtime refuses sessions of another device than its own.
  virtual std::string device() const = 0;
  virtual const CompressedCache& cache() const = 0;

  // One block of new tokens at positions [cache().length(), ...): attend once for every layer, then end_block.
  virtual void begin_block(int64_t tokens, Visibility visibility) = 0;
  void begin_block(int64_t tokens) { begin_block(tokens, Visibility::kReplay); }
  // Applies RoPE to the queries, appends, attends. q (n, q_heads*d), k, v (n, kv_heads*d), all PRE-RoPE;
  // out (n, q_heads*d).
  virtual void attend(int layer, ConstMatrix q, ConstMatrix k, ConstMatrix v, MutMatrix out) = 0;
  // Closes the block; where the cache's policy decides at this length, it does. No block reaches beyond
  // CompressedCache::block_limit().
  virtual void end_block() = 0;
  virtual void expect_prompt(int64_t tokens) = 0;  // CompressedCache::expect_prompt
  virtual void end_exact_prefill() = 0;            // CompressedCache::end_exact_prefill
  // Of CompressedCache, for speculative decoding. kUnavailable from a session that takes no token back.
  virtual void speculate();
  virtual void truncate(int64_t n);
  virtual void commit(int64_t n);
  virtual void recall(const RecalledPairs* pairs);

  virtual const AttendStats& stats() const = 0;
  virtual double attend_seconds() const = 0;
  virtual void set_tap(AttentionTap* tap) = 0;  // null for none
  // Bytes that it keeps between blocks, beside the cache and the backend.
  virtual int64_t held_bytes() const = 0;
  // Of memory of a device, rows and codes with the room that they have to grow; what sequences share is apart.
  virtual int64_t device_bytes() const { return 0; }
};

inline std::unique_ptr<KvSession> make_kv_session(CompressedCache& cache, AttentionBackend& backend,
                                                  std::pmr::memory_resource* memory = std::pmr::new_delete_resource()) {
  return backend.make_session(cache, memory);
}

}  // namespace vqkv
