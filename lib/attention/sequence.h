// Sequence: the K and V of one sequence at work. Owns what belongs together: counted memory, the cache in it, the
// backend that attends to it, and the session that a model calls.
#pragma once
#include <cstdint>
#include <memory>
#include <string>

#include "attention/session.h"
#include "cache/ledger.h"

namespace vqkv {

class Sequence {
 public:
  // `attention`: a name that make_attention_backend takes; errors are its.
  Sequence(std::shared_ptr<const CacheModel> model, const CachePolicy& policy, const std::string& attention);
  // With a model of its own.
  Sequence(std::shared_ptr<const CodecSet> codecs, const CachePolicy& policy, const std::string& attention);
  // An exact cache without codecs.
  Sequence(const CacheShape& shape, const CachePolicy& policy, const std::string& attention);
  // Sequences of a batch may share a backend, which serves them in turn: its buffers are there once and in no
  // sequence's ledger, and path() is of all of them.
  Sequence(std::shared_ptr<const CacheModel> model, const CachePolicy& policy,
           std::shared_ptr<AttentionBackend> backend);
  Sequence(Sequence&&) = default;
  Sequence& operator=(Sequence&&) = delete;  // would free the memory before the cache in it

  // An empty cache again; the backend stays, its buffers and what path() says included.
  void restart();

  KvSession& session() { return *session_; }
  const KvSession& session() const { return *session_; }
  CompressedCache& cache() { return *cache_; }
  const CompressedCache& cache() const { return *cache_; }
  const CountingResource& memory() const { return *memory_; }
  // The cache's ledger and, as workspace, what attention keeps between blocks for this sequence alone: the session's
  // buffers, and those of a backend of its own.
  ByteLedger bytes() const;
  // What its memory holds, and what a backend of its own keeps.
  int64_t allocated() const { return memory_->live() + own_backend_bytes(); }
  int64_t allocated_peak() const { return memory_->peak() + own_backend_bytes(); }  // the backend's as of now
  // What attention ran so far, joined by +.
  std::string path() const;
  // Share of the attention mass that fell on coded keys; 0 before anything attended.
  double coded_share() const;

  // kInternal, with `what`: bytes() are not those that are allocated.
  void check_ledger(const std::string& what) const;
  // The same, or the cache's are not what ledger_at gave for as many tokens (require_equal).
  void check_ledger(const ByteLedger& formula, const std::string& what) const;

 private:
  Sequence(std::shared_ptr<const CacheModel> model, const CachePolicy& policy,
           std::shared_ptr<AttentionBackend> backend, bool own_backend);
  int64_t own_backend_bytes() const { return own_backend_ ? backend_->held_bytes() : 0; }

  std::shared_ptr<const CacheModel> model_;
  CachePolicy policy_;
  std::shared_ptr<AttentionBackend> backend_;
  bool own_backend_ = false;
  std::unique_ptr<CountingResource> memory_;
  std::unique_ptr<CompressedCache> cache_;
  std::unique_ptr<KvSession> session_;
};

}  // namespace vqkv
