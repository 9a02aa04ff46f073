// The map of one sequence: which token is where in which form, as integers alone; tables of pages; the ledger that
// follows from them. What the integers point at is the store's business (cache/store.h).
#pragma once
#include <cstdint>
#include <memory>
#include <memory_resource>
#include <span>
#include <vector>

#include "cache/cache.h"
#include "cache/keep_rule.h"
#include "cache/model.h"

namespace vqkv {

// Where a block of bytes lies in a store; 0: nowhere. On a host its address, on a device the address there.
using BlockAddress = uint64_t;

// A table of blocks that come at the back and leave at the front. Its capacity is a pure function of how many blocks
// are live, so that the ledger of any length can be computed without a history.
struct BlockTable {
  BlockAddress* blocks = nullptr;
  int32_t count = 0;
  int32_t capacity = 0;
  int64_t first = 0;  // index of blocks[0] on its grid
  static int64_t capacity_for(int64_t live) { return (live + 7) / 8 * 8; }
  BlockAddress at(int64_t index) const { return blocks[index - first]; }
};

// Exact and coded extent of one (layer, role).
//   [0, S) sinks, exact for ever · [S, coded_end) coded, or dropped by a policy that drops · [exact_begin, tokens)
//   exact; the two overlap inside a block only
struct RoleMap {
  BlockAddress sinks = 0;
  BlockTable chunks;
  int64_t exact_begin = 0;
  int64_t coded_end = 0;
};

// Where the coded tokens of one (layer, role) pass from a tier into the next older one: the older holds those before
// coded_end, the newer those from `begin` on; the two overlap inside a block only.
struct TierBoundary {
  int64_t begin = 0;
  int64_t coded_end = 0;
};

// Tokens of one (layer, head) that a policy took out: a bit a position. No words: nothing was evicted.
struct EvictedSet {
  uint64_t* words = nullptr;
  int64_t count = 0;  // words
  bool contains(int64_t position) const {
    return position / 64 < count && (words[position / 64] >> (position % 64) & 1) != 0;
  }
};

// Positions of the slots of one body, ascending.
struct SlotList {
  int32_t* positions = nullptr;
  int32_t count = 0, capacity = 0;
};

// What the tokens that one head sees received, for a rule that asks.
struct MassSums {
  double* sums = nullptr;
  int32_t count = 0, capacity = 0;
};

// Coded tokens of one unit: slots without gaps, in pages. Those of a newer tier leave at the front as they age.
struct UnitMap {
  BlockTable pages;
  SlotList* listed = nullptr;  // null while slot s holds token sinks + s: while no policy gave a slot up
  BlockAddress overlay = 0;    // StoredOverlay entries in the order of their tokens
  int32_t overlay_count = 0, overlay_capacity = 0;
  uint32_t overlay_dropped = 0;  // entries before the first, gone with their tokens
};

// Queries of a layer's first tokens, held until its codecs are fitted to them: (count, q_heads * head_dim), fp32,
// before RoPE. The capacity follows from the count.
struct HeldQueries {
  BlockAddress rows = 0;
  int64_t count = 0;
  static int64_t capacity_for(int64_t count) { return (count + 63) / 64 * 64; }
};

// What one sequence fitted to its prompt.
struct FittedForm {
  std::unique_ptr<SequenceState> state;
  CodedForm form;
  int64_t state_bytes = 0, form_bytes = 0;
  // Memory of a fitted form beside that of the model.
  static int64_t bytes(const CodedForm& fitted, const CodedForm& model) {
    return static_cast<int64_t>(sizeof(FittedForm) - sizeof(CodedForm)) + fitted.bytes(model);
  }
};

class SequenceMap {
 public:
  SequenceMap(std::shared_ptr<const CacheModel> of_model, CachePolicy of_policy, std::pmr::memory_resource* memory);
  ~SequenceMap();
  SequenceMap(const SequenceMap&) = delete;
  SequenceMap& operator=(const SequenceMap&) = delete;

  size_t slot(int layer, Role role) const { return static_cast<size_t>(2 * layer + (role == Role::kValue)); }
  RoleMap& role(int layer, Role r) { return roles[slot(layer, r)]; }
  const RoleMap& role(int layer, Role r) const { return roles[slot(layer, r)]; }
  const EvictedSet& evicted_set(int layer, int head) const {
    return evicted[static_cast<size_t>(layer * model->shape().kv_heads + head)];
  }
  // The sequence's own form of a unit where it fitted one.
  const CodedForm& form(size_t unit) const {
    return fitted.empty() || !fitted[unit] ? *model->units()[unit].form : fitted[unit]->form;
  }
  // The form that the open block reads its codes in.
  const CodedForm& form_read(size_t unit) const {
    return open && visibility == Visibility::kDraft ? *model->units()[unit].draft : form(unit);
  }
  const SequenceState* state(size_t unit) const {
    return fitted.empty() || !fitted[unit] ? nullptr : fitted[unit]->state.get();
  }

  int64_t row_bytes() const {  // of one token, one role, all heads
    return int64_t{model->shape().kv_heads} * model->shape().head_dim *
           static_cast<int64_t>(dtype_size(policy.exact_dtype));
  }
  int64_t total() const { return length + pending; }
  int64_t query_bytes() const { return int64_t{model->shape().q_heads} * model->shape().head_dim * 4; }  // of one token
  // Some token of the layer was coded, or dropped.
  bool coded(int layer) const {
    return std::max(role(layer, Role::kKey).coded_end, role(layer, Role::kValue).coded_end) > policy.sinks;
  }
  // End of what a query at `position` sees coded in `tier` or an older one, honouring the open block's visibility.
  int64_t coded_end(Role role, int64_t position, int tier = 0) const;
  TierBoundary& boundary(int older_tier, int layer, Role r) {
    return boundaries[static_cast<size_t>(2 * (older_tier - 1) * model->shape().layers) + slot(layer, r)];
  }
  const TierBoundary& boundary(int older_tier, int layer, Role r) const {
    return boundaries[static_cast<size_t>(2 * (older_tier - 1) * model->shape().layers) + slot(layer, r)];
  }
  // Tokens [tier_begin, tier_end) are there as codes of the tier.
  int64_t tier_begin(int tier, int layer, Role r) const {
    return tier + 1 < model->tiers() ? boundary(tier + 1, layer, r).begin : policy.sinks;
  }
  int64_t tier_end(int tier, int layer, Role r) const {
    return tier > 0 ? boundary(tier, layer, r).coded_end : role(layer, r).coded_end;
  }
  // CompressedCache::block_limit, reads.
  int64_t block_limit() const;
  CacheReads reads(int64_t tokens, bool draft) const;
  // Where whole codec blocks end, when everything before `end` is coded.
  int64_t whole_blocks(Role role, int64_t end) const;

  void resize(BlockTable& table, int64_t live);
  void mark_evicted(int layer, int head, std::span<const int64_t> positions);
  void forget_evictions(int64_t from);
  // Positions that a head sees of the first `tokens`, ascending, and how many of total() they are.
  std::vector<int32_t> seen(int layer, int head, int64_t tokens) const;
  int64_t seen_tokens(int layer, int head) const;

  // The length at which the policy's rule decides next (KeepRule::kNever without one).
  int64_t next_decision() const { return policy.keep ? policy.keep->next_decision(length, prompt) : KeepRule::kNever; }
  // What the rule asks of the open block's queries in `layer`; an empty range: nothing.
  MassRequest observe(int layer);
  // Takes what the rule gives up at this length out of the heads' sight.
  void decide(int layer);
  // Keeps what is there of `count` sums, the rest 0.
  void resize_sums(MassSums& m, int64_t count);
  int64_t slots(size_t unit) const { return slot_end(unit) - slot_begin(unit); }  // tokens that are there as codes
  // Slots [slot_begin, slot_end): the first are gone where tokens passed into an older tier.
  int64_t slot_begin(size_t unit) const;
  int64_t slot_end(size_t unit) const;
  CodedBody body(size_t unit) const { return CodedBody(units[unit], slot_end(unit)); }
  // Their positions, or nothing where slot s holds token sinks + s.
  std::span<const int32_t> slot_positions(size_t unit) const {
    const SlotList* list = units[unit].listed;
    return list ? std::span<const int32_t>(list->positions, static_cast<size_t>(list->count))
                : std::span<const int32_t>();
  }
  bool lists_slots(size_t unit) const { return units[unit].listed != nullptr; }
  void list_slots(size_t unit, std::span<const int32_t> positions);
  // Room for `count` positions; keeps those that are there.
  void reserve_slots(SlotList& list, int64_t count);
  // Some head of the unit still sees some token of [from, to).
  bool alive(size_t unit, int64_t from, int64_t to) const;

  ByteLedger bytes() const;

  std::shared_ptr<const CacheModel> model;
  CachePolicy policy;
  std::pmr::memory_resource* memory;                     // of tables and sets
  std::pmr::vector<RoleMap> roles;                       // (layers * 2)
  std::pmr::vector<TierBoundary> boundaries;             // (tiers - 1, layers * 2)
  std::pmr::vector<UnitMap> units;                       // (units)
  std::pmr::vector<EvictedSet> evicted;                  // (layers * kv_heads)
  std::pmr::vector<std::unique_ptr<FittedForm>> fitted;  // (units), empty before the first
  std::pmr::vector<MassSums> mass;                       // (layers * kv_heads), empty without a rule
  std::pmr::vector<HeldQueries> queries;                 // (layers), empty where no codec is fitted to them
  int64_t length = 0;
  int64_t pending = 0;    // tokens of the open block
  int64_t prompt = 0;     // tokens that are seen exactly before anything is coded, where that was said
  int64_t decided = 0;    // the length at which the rule decided last
  int64_t observed = 0;   // queries below it are in the sums
  int64_t fitted_to = 0;  // tokens that parameters were fitted to
  int appended = 0;       // layers of the open block that have theirs
  bool open = false, exact_prompt = false;
  bool tentative = false;  // between speculate() and commit()
  const RecalledPairs* recalled = nullptr;
  Visibility visibility = Visibility::kReplay;
};

}  // namespace vqkv
