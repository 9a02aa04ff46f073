// The session over a cache in host memory.
#pragma once
#include <memory_resource>
#include <vector>

#include "attention/session.h"

namespace vqkv {

class KvSessionCpu final : public KvSession {
 public:
  KvSessionCpu(CompressedCache& cache, AttentionBackend& backend,
               std::pmr::memory_resource* memory = std::pmr::new_delete_resource());
  std::string device() const override { return "cpu"; }
  const CompressedCache& cache() const override { return cache_; }
  using KvSession::begin_block;
  void begin_block(int64_t tokens, Visibility visibility) override;
  void attend(int layer, ConstMatrix q, ConstMatrix k, ConstMatrix v, MutMatrix out) override;
  void end_block() override;
  void expect_prompt(int64_t tokens) override { cache_.expect_prompt(tokens); }
  void end_exact_prefill() override { cache_.end_exact_prefill(); }
  void speculate() override { cache_.speculate(); }
  void truncate(int64_t n) override { cache_.truncate(n); }
  void commit(int64_t n) override { cache_.commit(n); }
  void recall(const RecalledPairs* pairs) override { cache_.recall(pairs); }
  const AttendStats& stats() const override { return stats_; }
  double attend_seconds() const override { return attend_seconds_; }
  void set_tap(AttentionTap* tap) override { tap_ = tap; }
  int64_t held_bytes() const override;

 private:
  CompressedCache& cache_;
  AttentionBackend& backend_;
  AttendStats stats_;
  AttentionTap* tap_ = nullptr;
  double attend_seconds_ = 0;
  std::pmr::vector<float> rotated_;
};

}  // namespace vqkv
