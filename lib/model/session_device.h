// Caches on a device behind KvSession. The host's CompressedCache says which token is where in which form, and codes;
// the device holds the rows that are exact and the codes as its kernels read them, and no other rows.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <memory_resource>
#include <span>
#include <vector>

#include "attention/coded_tiles.h"
#include "attention/exact_prefill.h"
#include "attention/provided.h"
#include "attention/row_moves.h"
#include "attention/session.h"
#include "model/llama_device.h"

namespace vqkv {

class ExactDecoder;

// Exact rows of one sequence: per layer in pages, each token at a place of its own.
class DeviceRows {
 public:
  explicit DeviceRows(const CacheShape& shape);
  // Room for places [0, tokens); what stands at [0, held) stays.
  void reserve(int64_t tokens, int64_t held);
  uint16_t* keys(int layer) { return keys_[static_cast<size_t>(layer)].data(); }
  uint16_t* values(int layer) { return values_[static_cast<size_t>(layer)].data(); }
  const int32_t* page_table() const { return pages_.data(); }  // one for all
  int64_t bytes() const;

 private:
  int64_t page_values() const;
  CacheShape shape_;
  int64_t room_ = 0;  // pages
  std::vector<device::Buffer<uint16_t>> keys_, values_;
  device::Buffer<int32_t> pages_;
};

class DeviceSession final : public KvSession {
 public:
  // forms: of the cache's codes; null: it codes nothing. kUnavailable for policies that a device has no form of.
  DeviceSession(CompressedCache& cache, std::shared_ptr<const CodedForms> forms);
  ~DeviceSession() override;

  std::string device() const override { return "cuda"; }
  const CompressedCache& cache() const override { return cache_; }
  using KvSession::begin_block;
  // Of `tokens` more tokens, how many see the same ones as codes, or dropped: a block holds no more.
  int64_t alike(int64_t tokens, Visibility visibility) const;
  // kUnavailable for kAllCoded and kDraft.
  void begin_block(int64_t tokens, Visibility visibility) override;
  void attend(int layer, ConstMatrix q, ConstMatrix k, ConstMatrix v, MutMatrix out) override;  // kInternal
  void end_block() override;
  void expect_prompt(int64_t tokens) override { cache_.expect_prompt(tokens); }
  void end_exact_prefill() override { cache_.end_exact_prefill(); }
  const AttendStats& stats() const override { return stats_; }  // none are counted
  double attend_seconds() const override { return 0; }          // within the runtime's launches
  void set_tap(AttentionTap* tap) override;                     // kUnavailable but for none
  int64_t held_bytes() const override { return 0; }             // of the host
  int64_t device_bytes() const override;

  // Of the open block, by a device's runtime, layer after layer. `rows` has all but where keys and values go: puts them
  // there and attends, out (rows, q_heads * head_dim).
  void attend(int layer, QkvRows rows, float* out);
  // Its rows of the product with W_Q, W_K and W_V, biased and normed, once they are on the host: what the host's cache
  // codes, and a tap sees. (rows, (q_heads + 2 kv_heads) * head_dim).
  void append(int layer, ConstMatrix qkv);
  void set_rows_tap(ModelTap* tap) { rows_tap_ = tap; }

 private:
  void plan(int64_t tokens);
  void catch_up();  // with what the host has coded
  void attend_exact(const ExactRows& rows, const float* queries, int64_t tokens, float* out);

  CompressedCache& cache_;
  std::shared_ptr<const CodedForms> forms_;
  const CacheShape& shape_;
  AttendStats stats_;
  DeviceRows rows_;
  std::unique_ptr<CodedTiles> tiles_;
  ModelTap* rows_tap_ = nullptr;
  std::vector<int32_t> held_;  // position of the token at each place
  int64_t put_ = 0;            // slots that are there as tiles
  int64_t seen_ = 0;           // tokens that queries see as codes, or dropped
  int64_t before_ = 0;         // places that were taken before the open block
  // Of the open block:
  device::Buffer<int32_t> sequence_, place_, coded_, exact_;  // (rows)
  device::Buffer<RowMove> moves_;
  device::Buffer<PrefillBlock> block_;
  std::unique_ptr<ExactDecoder> decoder_;
  int splits_ = 0;
};

// Sessions on a device by the name "cuda". Sequences that share one share the books of their codec set on the device.
class DeviceBackend final : public AttentionBackend {
 public:
  std::string name() const override { return kDeviceAttention; }
  // Every plan: what a session can't take it refuses when it is made.
  std::optional<std::string> can(const DecodePlan&, Role) const override { return std::nullopt; }
  void attend(const CacheView&, int, ConstMatrix, MutMatrix, AttendStats*, AttentionTap*,
              MassRequest*) override;  // kInternal
  std::unique_ptr<KvSession> make_session(CompressedCache& cache, std::pmr::memory_resource* memory) override;

 private:
  std::map<std::shared_ptr<const CacheModel>, std::shared_ptr<const CodedForms>> forms_;
};

}  // namespace vqkv
