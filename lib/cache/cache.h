// CompressedCache: the K and V of one sequence. Per layer, role and unit: exact sinks, a coded body in pages, an exact
// recent window. Boundaries are per role and per query (FlushRule), so a block of queries that spans a flush sees both
// forms of the tokens in between; the exact form is dropped once no later query needs it. A token is coded once, from
// its exact value as stored (rounded to exact_dtype), so block and step replay code the same numbers. Where the codec
// set has several tiers, coded tokens pass into the next older one by the same rules (age_unit in cache/coding.h).
#pragma once
#include <cstdint>
#include <memory>
#include <memory_resource>
#include <span>
#include <vector>

#include "cache/keep_rule.h"
#include "cache/ledger.h"
#include "cache/policy.h"
#include "codec/codec_set.h"

namespace vqkv {

// How the queries of the block being appended see the cache.
enum class Visibility {
  kReplay,        // modes forced and stepwise: each query sees the coded body up to its own coded_end
  kExactPrefill,  // mode prefill-exact: queries see exact K/V; coding happens at end_exact_prefill()
  kAllCoded,      // mode fake-quant: every query sees every token coded, itself included (a tail shorter than a codec
                  // block stays exact); one window = one append
  kDraft,         // of a tentative block: as kReplay, but codes are read at the draft level of the cache's model
};

// What attention to one block has to read, in bytes, each code and each exact row once for all its queries.
struct CacheReads {
  int64_t codes = 0;  // with side data and exceptions
  int64_t exact = 0;  // sinks and window
};

class CacheModel;
class SequenceMap;
struct RecalledPairs;

// Three parts: the model side (cache/model.h), shared; the map (cache/map.h), integers alone; the store
// (cache/store.h), bytes. Attention reads a CacheView (cache/view.h).
class CompressedCache {
 public:
  // One model for all sequences of a codec set.
  CompressedCache(std::shared_ptr<const CacheModel> model, CachePolicy policy,
                  std::pmr::memory_resource* memory = std::pmr::new_delete_resource());
  // A model of its own.
  CompressedCache(std::shared_ptr<const CodecSet> codecs, CachePolicy policy,
                  std::pmr::memory_resource* memory = std::pmr::new_delete_resource());
  // An exact cache needs no codecs: keys are kept after RoPE, nothing is coded: policy.codes is taken as policy.drops.
  CompressedCache(const CacheShape& shape, CachePolicy policy,
                  std::pmr::memory_resource* memory = std::pmr::new_delete_resource());
  ~CompressedCache();
  CompressedCache(CompressedCache&&) noexcept;

  const CacheShape& shape() const;
  const CachePolicy& policy() const;
  const CodecSet* codecs() const;  // null for an exact cache made without
  const std::shared_ptr<const CacheModel>& model() const;
  int64_t length() const;  // tokens held (as of the last end_block)

  // One block of n new tokens at positions [length, length + n): call append once for every layer, then end_block.
  // k is PRE-RoPE (n, kv_heads * head_dim), v likewise, and q PRE-RoPE (n, q_heads * head_dim): held until codecs that
  // are fitted to queries have been, and needed by nobody else. Rows longer than a flush are fine.
  void begin_block(int64_t n, Visibility visibility = Visibility::kReplay);
  void append(int layer, ConstMatrix k, ConstMatrix v, ConstMatrix q = {});
  void end_block();
  void end_exact_prefill();  // codes what the policy says, drops the exact prompt
  // Where a policy's rule decides at the end of a prompt that is seen exactly: how long that is, before its first
  // block.
  void expect_prompt(int64_t tokens);
  // The longest block that may begin now: the policy's rule decides at its end, or later; a tentative one needs nothing
  // coded that is not.
  int64_t block_limit() const;
  // What the policy's rule asks of the open block in `layer`, after append; an empty range: nothing. Attention adds to
  // it, and end_block decides.
  MassRequest observe(int layer);
  // Rolls back to n tokens, to the state of a cache that never saw the others; only into the exact window, behind what
  // parameters were fitted to and the last decision of the policy's rule, and where nothing that its next one rests on
  // goes (kInternal otherwise).
  void truncate(int64_t n);

  // Speculative decoding. From here to commit() blocks are tentative: none codes a token or drops one, so truncate()
  // takes back any of them, and none may reach beyond block_limit(), where a query would see more coded than there is.
  // kUsage under a policy that gives tokens up by attention, and where every query's own token may be coded.
  void speculate();
  // Keeps the first n tokens and codes those that the policy says: the state of a cache that saw n tokens alone.
  void commit(int64_t n);
  // What attention to a block of n tokens more will read; draft: under Visibility::kDraft.
  CacheReads reads(int64_t n, bool draft = false) const;

  // Pairs that the queries of the blocks to come see in place of the codes of their tokens; null: none. The caller
  // keeps them while they serve. Only where keys are coded after RoPE, no map of a codec is folded into queries, none
  // rounds them, and nothing is given up (kInternal otherwise).
  void recall(const RecalledPairs* pairs);

  // Takes positions out of one head's sight, between blocks. Twice the same is fine. Codes that no head of their unit
  // sees any more (whole blocks of codecs that group along tokens) are given up: the others move together, and the
  // pages behind them are freed. What is lost while it is exact is never coded, and leaves with the window. A seam for
  // a caller's own eviction: what a policy gives up goes the same way, by itself (cache/keep_rule.h).
  void evict(int layer, int kv_head, std::span<const int64_t> positions);

  // The end of the tokens that are coded for a query at `position`, honouring the block's visibility; they begin behind
  // the sinks.
  int64_t coded_end(Role role, int64_t position) const;

  ByteLedger bytes() const;
  double encode_seconds() const;  // spent coding, all layers

  bool fitted() const;  // some codec has parameters of this prompt

  const SequenceMap& map() const;  // opaque outside lib/cache: read through a CacheView

 private:
  struct Parts;
  std::unique_ptr<Parts> parts_;
};

// What the layout of a unit doesn't tell; measured while coding.
struct UnitExtras {
  double exceptions = 0;    // a coded token
  int64_t state_bytes = 0;  // parameters fitted to the prompt
  int64_t form_bytes = 0;   // plans and decoders under them (fitted_form_bytes)
};
int64_t fitted_form_bytes(const Codec& codec, const UnitShape& unit, const SequenceState& state);

// The ledger of a sequence of `tokens` tokens, computed from layouts and `extras` (one a unit, or none): what `memory`
// and the byte columns of a sweep show at contexts that were never run. Equal to CompressedCache::bytes() after replay
// of that many tokens, but for the room that exceptions have to grow.
ByteLedger ledger_at(const CodecSet& codecs, const CachePolicy& policy, int64_t tokens,
                     std::span<const UnitExtras> extras = {});

}  // namespace vqkv
