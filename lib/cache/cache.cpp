#include "cache/cache.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "cache/cache_parts.h"
#include "core/error.h"
#include "core/thread_pool.h"

namespace vqkv {

CompressedCache::CompressedCache(std::shared_ptr<const CacheModel> model, CachePolicy policy,
                                 std::pmr::memory_resource* memory) {
  if (!model->codecs()) policy.codes = policy.drops;
  if (model->codecs()) policy = policy.for_codecs(*model->codecs());
  parts_ = std::make_unique<Parts>(std::move(model), policy, memory);
}
CompressedCache::CompressedCache(std::shared_ptr<const CodecSet> codecs, CachePolicy policy,
                                 std::pmr::memory_resource* memory)
    : CompressedCache(std::make_shared<const CacheModel>(std::move(codecs)), policy, memory) {}
CompressedCache::CompressedCache(const CacheShape& shape, CachePolicy policy, std::pmr::memory_resource* memory)
    : CompressedCache(std::make_shared<const CacheModel>(shape), policy, memory) {}
CompressedCache::~CompressedCache() = default;
CompressedCache::CompressedCache(CompressedCache&&) noexcept = default;

const CacheShape& CompressedCache::shape() const { return parts_->model->shape(); }
const CachePolicy& CompressedCache::policy() const { return parts_->map.policy; }
const CodecSet* CompressedCache::codecs() const { return parts_->model->codecs(); }
const std::shared_ptr<const CacheModel>& CompressedCache::model() const { return parts_->model; }
const SequenceMap& CompressedCache::map() const { return parts_->map; }
int64_t CompressedCache::length() const { return parts_->map.length; }
double CompressedCache::encode_seconds() const { return parts_->encode_seconds; }
ByteLedger CompressedCache::bytes() const { return parts_->map.bytes(); }
bool CompressedCache::fitted() const { return !parts_->map.fitted.empty(); }

int64_t CompressedCache::coded_end(Role role, int64_t position) const { return parts_->map.coded_end(role, position); }

void CompressedCache::begin_block(int64_t n, Visibility visibility) {
  SequenceMap& map = parts_->map;
  VQKV_CHECK(!map.open && n > 0 && map.length + n < INT32_MAX);
  if (map.policy.drops && visibility == Visibility::kAllCoded)
    fail_usage("fake-quant codes every token; a cache that drops what leaves its window has none to code");
  if (parts_->model->tiers() > 1 && map.policy.keeps_codes() && visibility == Visibility::kAllCoded)
    fail_usage("fake-quant codes every token alike; the codec's tiers (codec.tiers) code it by its age");
  if (map.policy.keep && visibility == Visibility::kAllCoded)
    fail_usage(
        fmt::format("fake-quant codes all tokens at once; {} decides as the text goes on", map.policy.keep->text()));
  if (visibility == Visibility::kAllCoded && map.length + n < map.policy.waits)
    fail_usage(fmt::format("fake-quant codes every token of {}; {}", map.length + n, map.policy.waits_text()));
  if (map.policy.keep && visibility == Visibility::kExactPrefill && map.prompt < map.length + n)
    fail_internal(fmt::format("an exact prompt reaches {} tokens where {} were expected; {} decides at its end",
                              map.length + n, map.prompt, map.policy.keep->text()));
  VQKV_CHECK(n <= map.block_limit());
  VQKV_CHECK(visibility != Visibility::kDraft || (map.tentative && parts_->model->drafts()));
  VQKV_CHECK(!map.exact_prompt || visibility == Visibility::kExactPrefill);  // end_exact_prefill() comes first
  map.open = true;
  map.pending = n;
  map.appended = 0;
  map.visibility = visibility;
}

void CompressedCache::append(int layer, ConstMatrix k, ConstMatrix v, ConstMatrix q) {
  Parts& c = *parts_;
  SequenceMap& map = c.map;
  const CacheShape& shape = c.model->shape();
  const int64_t d = shape.head_dim, width = shape.kv_heads * d, pending = map.pending;
  VQKV_CHECK(map.open && layer == map.appended && layer < shape.layers);
  VQKV_CHECK(k.rows == pending && v.rows == pending && k.cols == width && v.cols == width);

  // Keys: heads whose unit codes after RoPE are rotated once, here.
  c.staging.resize(static_cast<size_t>(pending * width));
  MutMatrix rows(c.staging.data(), pending, width);
  constexpr int64_t kRows = 32;  // a task: tens of microseconds
  parallel_for((pending + kRows - 1) / kRows, [&](int64_t task) {
    const int64_t first = task * kRows, count = std::min(kRows, pending - first);
    std::array<int32_t, kRows> positions;
    for (int64_t r = 0; r < count; ++r) {
      std::copy_n(k.row(first + r), width, rows.row(first + r));
      positions[static_cast<size_t>(r)] = static_cast<int32_t>(map.length + first + r);
    }
    for (int h = 0; h < shape.kv_heads; ++h)
      if (c.model->keys_post_rope(layer, h))
        rope_apply(c.model->rope(), positions.data(), rows.slice_rows(first, count).slice_cols(h * d, d));
  });
  // Allocation first and alone: the order of blocks in memory does not depend on threads.
  for (const Role role : {Role::kKey, Role::kValue}) c.grow_chunks(map.role(layer, role), map.total());
  const auto store = [&](int64_t i) {
    const Role role = i % 2 == 0 ? Role::kKey : Role::kValue;
    store_exact(map, layer, role, static_cast<int>(i / 2), role == Role::kKey ? ConstMatrix(rows) : v, map.length);
  };
  const int64_t stores = 2 * shape.kv_heads;
  if (pending < kRows)  // a step stores less than waking a thread costs
    for (int64_t i = 0; i < stores; ++i) store(i);
  else
    parallel_for(stores, store);
  ++map.appended;
  c.hold_queries(layer, q);
  if (!map.policy.codes || map.tentative || map.visibility == Visibility::kExactPrefill) return;
  // What the last query of this block and the first of the next will see coded.
  int64_t end[2];
  for (const Role role : {Role::kKey, Role::kValue}) {
    end[static_cast<int>(role)] = map.visibility == Visibility::kAllCoded ? map.whole_blocks(role, map.total())
                                                                          : map.policy.coded_among(role, map.total());
  }
  c.code({&layer, 1}, map.total(), end[0], end[1]);
  c.age({&layer, 1}, map.total());
}

void CompressedCache::end_block() {
  Parts& c = *parts_;
  SequenceMap& map = c.map;
  VQKV_CHECK(map.open && map.appended == c.model->shape().layers);
  if (map.total() == map.next_decision()) c.decide();
  map.open = false;
  map.length += map.pending;
  map.pending = 0;
  std::vector<float>().swap(c.staging);  // "= {}" would keep its memory
  if (map.tentative) return;
  if (map.visibility == Visibility::kExactPrefill) map.exact_prompt = map.policy.codes;
  for (RoleMap& r : map.roles) c.drop_exact(r, map.exact_prompt ? r.exact_begin : r.coded_end, map.length);
  c.drop_aged();
}

void CompressedCache::end_exact_prefill() {
  Parts& c = *parts_;
  SequenceMap& map = c.map;
  VQKV_CHECK(!map.open);
  if (!map.exact_prompt) return;
  map.exact_prompt = false;
  c.settle();
}

void CompressedCache::speculate() {
  SequenceMap& map = parts_->map;
  VQKV_CHECK(!map.open && !map.exact_prompt && !map.tentative);
  if (map.policy.keep)
    fail_usage(
        fmt::format("speculative decoding takes tokens back, and {} decides by what they attended to; take a policy "
                    "that sums nothing (all, streaming)",
                    map.policy.keep->text()));
  map.tentative = true;
  if (map.block_limit() > 0) return;
  map.tentative = false;
  fail_usage(
      "speculative decoding needs a window of 1 token or more (cache.window): without one a query's own token "
      "may be coded, and no coded token can be taken back");
}

void CompressedCache::commit(int64_t n) {
  SequenceMap& map = parts_->map;
  VQKV_CHECK(map.tentative);
  truncate(n);
  map.tentative = false;
  parts_->settle();
}

void CompressedCache::recall(const RecalledPairs* pairs) {
  const SequenceMap& map = parts_->map;
  VQKV_CHECK(!pairs || (!map.open && !map.policy.keep));
  for (const CacheModel::Unit& u : parts_->model->units()) VQKV_CHECK(!pairs || u.decodes_rows());
  parts_->map.recalled = pairs;
}

CacheReads CompressedCache::reads(int64_t n, bool draft) const {
  VQKV_CHECK(!parts_->map.open && n > 0 && (!draft || parts_->model->drafts()));
  return parts_->map.reads(n, draft);
}

void CompressedCache::expect_prompt(int64_t tokens) {
  SequenceMap& map = parts_->map;
  VQKV_CHECK(!map.open && tokens >= map.length);
  map.prompt = tokens;
}

int64_t CompressedCache::block_limit() const { return parts_->map.block_limit(); }

MassRequest CompressedCache::observe(int layer) {
  VQKV_CHECK(parts_->map.open && layer < parts_->map.appended);
  return parts_->map.observe(layer);
}

void CompressedCache::truncate(int64_t n) {
  Parts& c = *parts_;
  SequenceMap& map = c.map;
  VQKV_CHECK(!map.open && n >= 0 && n <= map.length);
  for (const RoleMap& r : map.roles)
    if (n < r.coded_end && r.coded_end > map.policy.sinks)
      fail_internal(
          fmt::format("truncate to {} tokens: {} are coded; only exact tokens can be rolled back", n, r.coded_end));
  if (n < map.length && n < map.decided)
    fail_internal(
        fmt::format("truncate to {} tokens: at {} {} took tokens out; roll back to {} or later, or take a policy that "
                    "takes none out (all, streaming)",
                    n, map.decided, map.policy.keep->text(), map.decided));
  if (n < map.length && n < map.observed)
    fail_internal(fmt::format(
        "truncate to {} tokens: {} sums what tokens received, and what the queries from {} on gave "
        "can't be told apart; roll back to {} or later, or take a policy that sums nothing (all, streaming)",
        n, map.policy.keep->text(), n, map.observed));
  if (n < map.length && n < map.fitted_to)
    fail_internal(fmt::format("truncate to {} tokens: parameters were fitted to the first {}; roll back to {} or later",
                              n, map.fitted_to, map.fitted_to));
  map.length = n;
  for (size_t layer = 0; layer < map.queries.size(); ++layer)
    c.keep_queries(static_cast<int>(layer), std::min(n, map.queries[layer].count));
  for (RoleMap& r : map.roles) c.drop_exact(r, r.exact_begin, n);
  map.forget_evictions(n);
}

void CompressedCache::evict(int layer, int kv_head, std::span<const int64_t> positions) {
  Parts& c = *parts_;
  SequenceMap& map = c.map;
  VQKV_CHECK(!map.open && layer >= 0 && layer < shape().layers && kv_head >= 0 && kv_head < shape().kv_heads);
  if (c.model->sees_lower()) fail_usage("codecs that see the layer below need every token in it; none can be given up");
  if (c.model->tiers() > 1) fail_usage("the tiers of a codec hold all tokens of an age; none can be given up");
  if (positions.empty()) return;
  map.mark_evicted(layer, kv_head, positions);
  for (const Role role : {Role::kKey, Role::kValue})
    if (const int unit = c.model->unit_of(layer, kv_head, role); unit >= 0) c.compact(static_cast<size_t>(unit));
}

}  // namespace vqkv
