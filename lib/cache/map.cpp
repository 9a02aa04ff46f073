#include "cache/map.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <new>
#include <set>

#include "cache/coding.h"
#include "cache/store.h"
#include "core/error.h"

namespace vqkv {
namespace {

template <class T>
T* allocate(std::pmr::memory_resource* memory, int64_t n) {
  return n == 0 ? nullptr : static_cast<T*>(memory->allocate(static_cast<size_t>(n) * sizeof(T), alignof(T)));
}
template <class T>
void release(std::pmr::memory_resource* memory, T* p, int64_t n) {
  if (p) memory->deallocate(p, static_cast<size_t>(n) * sizeof(T), alignof(T));
}

constexpr int64_t kAddress = sizeof(BlockAddress), kOverlay = sizeof(StoredOverlay);

// Exact rows of one role in all layers: `held` of them beyond the sinks, in `chunks` chunks.
void add_exact(ByteLedger& b, int64_t sinks, int64_t total, int64_t held, int64_t chunks, int64_t row, int64_t layers) {
  b.window += layers * held * row;
  b.padding += layers * (chunks * kChunkTokens - held) * row;
  if (total == 0) return;
  b.sinks += layers * std::min(sinks, total) * row;
  b.padding += layers * (sinks - std::min(sinks, total)) * row;
}

// Pages that slots [begin, end) lie in.
int64_t pages_of(const PageLayout& layout, int64_t begin, int64_t end) {
  return end > begin ? (end + layout.tokens() - 1) / layout.tokens() - begin / layout.tokens() : 0;
}

// `coded` tokens of a unit in `pages` pages.
void add_codes(ByteLedger& b, const PageLayout& layout, int64_t coded, int64_t pages) {
  b.codes += layout.code_bytes(coded);
  b.side += layout.side_bytes(coded);
  b.overlay += layout.pointer_bytes(coded);
  b.padding +=
      pages * layout.bytes() - layout.code_bytes(coded) - layout.side_bytes(coded) - layout.pointer_bytes(coded);
}

}  // namespace

SequenceMap::SequenceMap(std::shared_ptr<const CacheModel> of_model, CachePolicy of_policy,
                         std::pmr::memory_resource* resource)
    : model(std::move(of_model)),
      policy(of_policy),
      memory(resource),
      roles(resource),
      boundaries(resource),
      units(resource),
      evicted(resource),
      fitted(resource),
      mass(resource),
      queries(resource) {
  model->check(policy);
  const CacheShape& shape = model->shape();
  RoleMap start;
  start.exact_begin = start.coded_end = policy.sinks;
  roles.assign(static_cast<size_t>(2 * shape.layers), start);
  boundaries.assign(static_cast<size_t>(model->tiers() - 1) * roles.size(), {policy.sinks, policy.sinks});
  evicted.resize(static_cast<size_t>(shape.layers * shape.kv_heads));
  units.resize(model->units().size());
  if (policy.keep) mass.resize(evicted.size());
  if (model->fits_queries() && policy.keeps_codes()) queries.resize(static_cast<size_t>(shape.layers));
}

SequenceMap::~SequenceMap() {
  for (RoleMap& r : roles) release(memory, r.chunks.blocks, r.chunks.capacity);
  for (UnitMap& u : units) {
    release(memory, u.pages.blocks, u.pages.capacity);
    if (!u.listed) continue;
    release(memory, u.listed->positions, u.listed->capacity);
    release(memory, u.listed, 1);
  }
  for (EvictedSet& e : evicted) release(memory, e.words, e.count);
  for (MassSums& m : mass) release(memory, m.sums, m.capacity);
}

int64_t SequenceMap::coded_end(Role r, int64_t position, int tier) const {
  if (!policy.codes) return std::min(policy.sinks, position + 1);
  const RoleMap& first = role(0, r);
  // After a rollback the rule may name a boundary below what was coded: the newer form is gone, the older one serves.
  const int64_t newer = tier > 0 ? boundary(tier, 0, r).begin : first.exact_begin;
  const int64_t gone = std::min(std::max(policy.sinks, newer), position + 1);
  if (open && visibility == Visibility::kExactPrefill) return gone;
  if (open && visibility == Visibility::kAllCoded && tier == 0)
    return std::max(gone, std::min(position + 1, first.coded_end));
  return std::max(gone, std::min(policy.coded_end(r, position, model->newer_tokens(tier)), position + 1));
}

int64_t SequenceMap::block_limit() const {
  const int64_t limit = next_decision() - length;
  if (!tentative || !policy.codes) return limit;
  const auto served = [&](int64_t position) {
    for (int tier = 0; tier < (policy.keeps_codes() ? model->tiers() : 1); ++tier)
      for (const Role r : {Role::kKey, Role::kValue})
        if (policy.coded_end(r, position, model->newer_tokens(tier)) > tier_end(tier, 0, r)) return false;
    return true;
  };
  // Boundaries only grow: the first query that is not served, by halving.
  int64_t low = length, high = length + std::min(limit, int64_t{1} << 20);
  while (low < high)
    if (const int64_t middle = low + (high - low) / 2; served(middle))
      low = middle + 1;
    else
      high = middle;
  return low - length;
}

CacheReads SequenceMap::reads(int64_t tokens, bool draft) const {
  CacheReads out;
  const int64_t end = length + tokens;
  for (const Role r : {Role::kKey, Role::kValue}) {
    const int64_t coded = std::max<int64_t>(0, coded_end(r, end - 1) - policy.sinks);
    out.exact += model->shape().layers * (end - coded) * row_bytes();
  }
  if (!policy.keeps_codes()) return out;
  for (size_t u = 0; u < units.size(); ++u) {
    const CacheModel::Unit& unit = model->units()[u];
    const Role r = unit.shape.role;
    const int64_t older = unit.tier + 1 < model->tiers() ? coded_end(r, end - 1, unit.tier + 1) : policy.sinks;
    // What a policy gave up is not there; else what the last query sees.
    const int64_t coded =
        lists_slots(u) ? units[u].listed->count : std::max<int64_t>(0, coded_end(r, end - 1, unit.tier) - older);
    const CodeLayout layout = draft ? unit.codec->level_layout(model->draft_level()) : unit.form->pages->layout();
    const int64_t bits = layout.code_bits_per_block() + layout.side_bits_per_block();
    out.codes += (coded / layout.block_tokens * bits + 7) / 8 + unit.form->pages->pointer_bytes(coded) +
                 units[u].overlay_count * kOverlay;
  }
  return out;
}

int64_t SequenceMap::whole_blocks(Role r, int64_t end) const {
  const int64_t block = model->block_tokens(r);
  return policy.sinks + std::max<int64_t>(0, end - policy.sinks) / block * block;
}

void SequenceMap::resize(BlockTable& table, int64_t live) {
  const int64_t capacity = BlockTable::capacity_for(live);
  VQKV_CHECK(live >= table.count && live < INT32_MAX);
  if (capacity == table.capacity) return;
  auto* blocks = allocate<BlockAddress>(memory, capacity);
  std::copy_n(table.blocks, table.count, blocks);
  release(memory, table.blocks, table.capacity);
  table.blocks = blocks;
  table.capacity = static_cast<int32_t>(capacity);
}

void SequenceMap::mark_evicted(int layer, int head, std::span<const int64_t> positions) {
  EvictedSet& set = evicted[static_cast<size_t>(layer * model->shape().kv_heads + head)];
  int64_t words = set.count;
  for (const int64_t p : positions) {
    VQKV_CHECK(p >= 0 && p < total());
    words = std::max(words, p / 64 + 1);
  }
  if (words > set.count) {
    auto* grown = allocate<uint64_t>(memory, words);
    std::fill_n(std::copy_n(set.words, set.count, grown), words - set.count, 0);
    release(memory, set.words, set.count);
    set.words = grown;
    set.count = words;
  }
  for (const int64_t p : positions) set.words[p / 64] |= uint64_t{1} << (p % 64);
}

void SequenceMap::forget_evictions(int64_t from) {
  for (EvictedSet& set : evicted)
    for (int64_t w = from / 64; w < set.count; ++w)
      set.words[w] &= w > from / 64 ? 0 : (uint64_t{1} << (from % 64)) - 1;
}

std::vector<int32_t> SequenceMap::seen(int layer, int head, int64_t tokens) const {
  const EvictedSet& gone = evicted_set(layer, head);
  std::vector<int32_t> out;
  for (int64_t first = 0; first < tokens; first += 64) {
    uint64_t left = first / 64 < gone.count ? ~gone.words[first / 64] : ~uint64_t{0};
    if (tokens - first < 64) left &= (uint64_t{1} << (tokens - first)) - 1;
    for (; left != 0; left &= left - 1) out.push_back(static_cast<int32_t>(first + std::countr_zero(left)));
  }
  return out;
}

void SequenceMap::resize_sums(MassSums& m, int64_t count) {
  const int64_t capacity = (count + 63) / 64 * 64, kept = std::min<int64_t>(m.count, count);
  if (capacity != m.capacity) {
    auto* sums = allocate<double>(memory, capacity);
    std::copy_n(m.sums, kept, sums);
    release(memory, m.sums, m.capacity);
    m.sums = sums;
    m.capacity = static_cast<int32_t>(capacity);
  }
  if (count > kept) std::fill_n(m.sums + kept, count - kept, 0.0);
  m.count = static_cast<int32_t>(count);
}

int64_t SequenceMap::slot_begin(size_t unit) const {
  const CacheModel::Unit& u = model->units()[unit];
  return tier_begin(u.tier, u.shape.layer, u.shape.role) - policy.sinks;
}

int64_t SequenceMap::slot_end(size_t unit) const {
  if (lists_slots(unit)) return units[unit].listed->count;
  const CacheModel::Unit& u = model->units()[unit];
  return policy.keeps_codes() ? std::max<int64_t>(0, tier_end(u.tier, u.shape.layer, u.shape.role) - policy.sinks) : 0;
}

void SequenceMap::reserve_slots(SlotList& list, int64_t count) {
  const int64_t capacity = std::max<int64_t>(64, (count + 63) / 64 * 64);
  if (capacity == list.capacity) return;
  auto* grown = allocate<int32_t>(memory, capacity);
  std::copy_n(list.positions, std::min<int64_t>(list.count, capacity), grown);
  release(memory, list.positions, list.capacity);
  list.positions = grown;
  list.capacity = static_cast<int32_t>(capacity);
}

void SequenceMap::list_slots(size_t unit, std::span<const int32_t> positions) {
  UnitMap& u = units[unit];
  if (!u.listed) u.listed = new (allocate<SlotList>(memory, 1)) SlotList;
  SlotList& list = *u.listed;
  list.count = 0;
  reserve_slots(list, static_cast<int64_t>(positions.size()));
  std::copy(positions.begin(), positions.end(), list.positions);
  list.count = static_cast<int32_t>(positions.size());
}

bool SequenceMap::alive(size_t unit, int64_t from, int64_t to) const {
  const UnitShape& u = model->units()[unit].shape;
  for (int h = u.first_head; h < u.first_head + u.heads; ++h) {
    const EvictedSet& set = evicted_set(u.layer, h);
    for (int64_t t = from; t < to; ++t)
      if (!set.contains(t)) return true;
  }
  return false;
}

ByteLedger SequenceMap::bytes() const {
  ByteLedger b;
  b.index = static_cast<int64_t>(roles.capacity() * sizeof(RoleMap) + units.capacity() * sizeof(UnitMap) +
                                 boundaries.capacity() * sizeof(TierBoundary) +
                                 evicted.capacity() * sizeof(EvictedSet) + fitted.capacity() * sizeof(fitted[0]) +
                                 mass.capacity() * sizeof(MassSums) + queries.capacity() * sizeof(HeldQueries));
  for (const HeldQueries& q : queries) b.workspace += HeldQueries::capacity_for(q.count) * query_bytes();
  for (const EvictedSet& e : evicted) b.index += e.count * static_cast<int64_t>(sizeof(uint64_t));
  for (const MassSums& m : mass) b.workspace += m.capacity * static_cast<int64_t>(sizeof(double));
  for (const RoleMap& r : roles) {
    const int64_t held = std::max<int64_t>(0, total() - std::max(policy.sinks, r.exact_begin));
    add_exact(b, policy.sinks, r.sinks ? total() : 0, held, r.chunks.count, row_bytes(), 1);
    b.index += r.chunks.capacity * kAddress;
  }
  for (size_t u = 0; u < units.size(); ++u) {
    const UnitMap& s = units[u];
    const PageLayout& pages = *form(u).pages;
    add_codes(b, pages, slots(u), s.pages.count);
    b.index += s.pages.capacity * kAddress;
    if (s.listed) b.index += static_cast<int64_t>(sizeof(SlotList)) + s.listed->capacity * int64_t{sizeof(int32_t)};
    b.overlay += s.overlay_count * kOverlay;
    b.padding += (s.overlay_capacity - s.overlay_count) * kOverlay;
  }
  for (const auto& f : fitted) {
    if (!f) continue;
    b.side += f->state_bytes;
    b.workspace += f->form_bytes;
  }
  b.codebooks = model->constant_bytes();
  return b;
}

int64_t fitted_form_bytes(const Codec& codec, const UnitShape& unit, const SequenceState& state) {
  const auto pages = std::make_shared<PageLayout>(codec.layout());
  const CodedForm model(codec, unit, PlanQuery{}, pages);
  return FittedForm::bytes(CodedForm(codec, unit, {-1, &state}, pages, &model), model);
}

ByteLedger ledger_at(const CodecSet& codecs, const CachePolicy& given, int64_t tokens,
                     std::span<const UnitExtras> extras) {
  const CachePolicy policy = given.for_codecs(codecs);
  VQKV_CHECK(tokens >= 0 && (extras.empty() || extras.size() == codecs.units().size()));
  if (policy.keep)
    fail_usage(
        fmt::format("what a cache holds under the policy {} depends on the text; `vqkv-eval replay` and `memory` "
                    "measure it",
                    policy.keep->text()));
  const CacheShape& shape = codecs.shape();
  const int64_t row = int64_t{shape.kv_heads} * shape.head_dim * static_cast<int64_t>(dtype_size(policy.exact_dtype));
  // What has left the exact rows of a role and `newer` coded tokens, counted after the sinks.
  const auto past_window = [&](Role role, int64_t newer = 0) {
    return std::max<int64_t>(0, policy.coded_among(role, tokens, newer) - policy.sinks);
  };
  ByteLedger b;
  b.index = 2 * shape.layers * static_cast<int64_t>(sizeof(RoleMap)) +
            2 * shape.layers * (codecs.tiers() - 1) * static_cast<int64_t>(sizeof(TierBoundary)) +
            static_cast<int64_t>(codecs.units().size() * sizeof(UnitMap)) +
            int64_t{shape.layers} * shape.kv_heads * static_cast<int64_t>(sizeof(EvictedSet));
  const int64_t past = std::max<int64_t>(0, tokens - policy.sinks);
  for (const Role role : {Role::kKey, Role::kValue}) {
    const int64_t gone = past_window(role), held = past - gone;
    const int64_t chunks = held == 0 ? 0 : (past + kChunkTokens - 1) / kChunkTokens - gone / kChunkTokens;
    add_exact(b, policy.sinks, tokens, held, chunks, row, shape.layers);
    b.index += shape.layers * BlockTable::capacity_for(chunks) * kAddress;
  }
  const bool any_coded = policy.keeps_codes() && past_window(Role::kKey) + past_window(Role::kValue) > 0;
  bool any_fitted = false;
  std::set<int> query_layers;  // fitted to queries
  for (size_t i = 0; i < codecs.units().size(); ++i) {
    const TrainedUnit& u = codecs.units()[i];
    const PageLayout pages(u.codec->layout());
    const int tier = u.spec.tier;
    const Role role = u.spec.unit.role;
    const auto older_than = [&](int t) { return past_window(role, codecs.newer_tokens(t)); };
    const int64_t end = policy.keeps_codes() ? older_than(tier) : 0;
    const int64_t begin = policy.keeps_codes() && tier + 1 < codecs.tiers() ? older_than(tier + 1) : 0;
    const int64_t coded = end - begin, count = pages_of(pages, begin, end);
    add_codes(b, pages, coded, count);
    b.index += BlockTable::capacity_for(count) * kAddress;
    if (policy.keeps_codes() && u.codec->fit_needs().queries) query_layers.insert(u.spec.unit.layer);
    if (extras.empty()) continue;
    b.overlay += std::llround(extras[i].exceptions * static_cast<double>(coded)) * kOverlay;
    if (!any_coded || extras[i].form_bytes == 0) continue;
    b.side += extras[i].state_bytes;
    b.workspace += extras[i].form_bytes;
    any_fitted = true;
  }
  if (any_fitted) b.index += static_cast<int64_t>(codecs.units().size() * sizeof(std::unique_ptr<FittedForm>));
  if (!query_layers.empty()) b.index += shape.layers * static_cast<int64_t>(sizeof(HeldQueries));
  if (tokens > 0 && !any_coded)
    b.workspace += static_cast<int64_t>(query_layers.size()) * HeldQueries::capacity_for(fit_tokens(policy, tokens)) *
                   shape.q_heads * shape.head_dim * int64_t{sizeof(float)};
  b.codebooks = codecs.constant_bytes();
  return b;
}

}  // namespace vqkv
