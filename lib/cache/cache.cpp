#include "cache/cache.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>

#include "cache/impl.h"
#include "core/clock.h"
#include "core/error.h"
#include "core/thread_pool.h"

namespace vqkv {

CompressedCache::CompressedCache(std::shared_ptr<const CodecSet> codecs, CachePolicy policy,
                                 std::pmr::memory_resource* memory) {
  VQKV_CHECK(codecs != nullptr);
  const CacheShape shape = codecs->shape();
  impl_ = std::make_unique<Impl>(shape, policy, std::move(codecs), memory);
}
CompressedCache::CompressedCache(const CacheShape& shape, CachePolicy policy, std::pmr::memory_resource* memory) {
  policy.codes = false;
  impl_ = std::make_unique<Impl>(shape, policy, nullptr, memory);
}
CompressedCache::~CompressedCache() = default;
CompressedCache::CompressedCache(CompressedCache&&) noexcept = default;

const CacheShape& CompressedCache::shape() const { return impl_->shape; }
const CachePolicy& CompressedCache::policy() const { return impl_->policy; }
const CodecSet* CompressedCache::codecs() const { return impl_->codecs.get(); }
int64_t CompressedCache::length() const { return impl_->length; }
double CompressedCache::encode_seconds() const { return impl_->encode_seconds; }
int64_t CompressedCache::bits_held() const { return 8 * bytes().total_sequence(); }

int64_t CompressedCache::coded_begin(Role) const { return impl_->policy.sinks; }

int64_t CompressedCache::coded_end(Role role, int64_t position) const {
  const Impl& c = *impl_;
  if (!c.policy.codes) return std::min(c.policy.sinks, position + 1);
  const RoleStore& store = c.role_store(0, role);
  // After a rollback the rule may name a boundary below what was coded: the exact form is gone, the coded one serves.
  const int64_t gone = std::min(std::max(c.policy.sinks, store.exact_begin), position + 1);
  if (c.open && c.visibility == Visibility::kExactPrefill) return gone;
  if (c.open && c.visibility == Visibility::kAllCoded) return std::max(gone, std::min(position + 1, store.coded_end));
  return std::max(gone, std::min(c.policy.coded_end(role, position), position + 1));
}

void CompressedCache::begin_block(int64_t n, Visibility visibility) {
  Impl& c = *impl_;
  VQKV_CHECK(!c.open && n > 0 && c.length + n < INT32_MAX);
  VQKV_CHECK(!c.exact_prompt || visibility == Visibility::kExactPrefill);  // end_exact_prefill() comes first
  c.open = true;
  c.pending = n;
  c.appended = 0;
  c.visibility = visibility;
}

void CompressedCache::append(int layer, ConstMatrix k, ConstMatrix v) {
  Impl& c = *impl_;
  const int64_t d = c.shape.head_dim, width = c.shape.kv_heads * d;
  VQKV_CHECK(c.open && layer == c.appended && layer < c.shape.layers);
  VQKV_CHECK(k.rows == c.pending && v.rows == c.pending && k.cols == width && v.cols == width);
  const int64_t total = c.length + c.pending;

  // Keys: heads whose unit codes after RoPE are rotated once, here.
  c.staging.resize(static_cast<size_t>(c.pending * width));
  MutMatrix rows(c.staging.data(), c.pending, width);
  constexpr int64_t kRows = 32;  // a task: tens of microseconds
  parallel_for((c.pending + kRows - 1) / kRows, [&](int64_t task) {
    const int64_t first = task * kRows, count = std::min(kRows, c.pending - first);
    std::array<int32_t, kRows> positions;
    for (int64_t r = 0; r < count; ++r) {
      std::copy_n(k.row(first + r), width, rows.row(first + r));
      positions[static_cast<size_t>(r)] = static_cast<int32_t>(c.length + first + r);
    }
    for (int h = 0; h < c.shape.kv_heads; ++h)
      if (c.keys_post_rope(layer, h))
        rope_apply(*c.rope, positions.data(), rows.slice_rows(first, count).slice_cols(h * d, d));
  });
  // Allocation first and alone: the order of blocks in memory does not depend on threads.
  for (const Role role : {Role::kKey, Role::kValue}) c.grow_chunks(c.roles[c.slot(layer, role)], total);
  const auto store = [&](int64_t i) {
    const Role role = i % 2 == 0 ? Role::kKey : Role::kValue;
    c.store_exact(layer, role, static_cast<int>(i / 2), role == Role::kKey ? ConstMatrix(rows) : v, c.length);
  };
  const int64_t stores = 2 * c.shape.kv_heads;
  if (c.pending < kRows)  // a step stores less than waking a thread costs
    for (int64_t i = 0; i < stores; ++i) store(i);
  else
    parallel_for(stores, store);
  ++c.appended;
  if (!c.policy.codes || c.visibility == Visibility::kExactPrefill) return;
  // What the last query of this block and the first of the next will see coded.
  int64_t end[2];
  for (const Role role : {Role::kKey, Role::kValue}) {
    end[static_cast<int>(role)] =
        c.visibility == Visibility::kAllCoded ? c.whole_blocks(role, total) : c.policy.coded_among(role, total);
  }
  c.code_role_units({layer}, total, end[0], end[1]);
}

void CompressedCache::end_block() {
  Impl& c = *impl_;
  VQKV_CHECK(c.open && c.appended == c.shape.layers);
  c.open = false;
  c.length += c.pending;
  c.pending = 0;
  c.staging = {};
  if (c.visibility == Visibility::kExactPrefill) c.exact_prompt = c.policy.codes;
  for (RoleStore& s : c.roles) c.drop_exact(s, c.exact_prompt ? s.exact_begin : s.coded_end, c.length);
}

void CompressedCache::end_exact_prefill() {
  Impl& c = *impl_;
  VQKV_CHECK(!c.open);
  if (!c.exact_prompt) return;
  std::vector<int> layers(static_cast<size_t>(c.shape.layers));
  std::iota(layers.begin(), layers.end(), 0);
  c.code_role_units(layers, c.length, c.policy.coded_among(Role::kKey, c.length),
                    c.policy.coded_among(Role::kValue, c.length));
  c.exact_prompt = false;
  for (RoleStore& s : c.roles) c.drop_exact(s, s.coded_end, c.length);
}

void CompressedCache::truncate(int64_t n) {
  Impl& c = *impl_;
  VQKV_CHECK(!c.open && n >= 0 && n <= c.length);
  for (const RoleStore& s : c.roles)
    if (n < s.coded_end && s.coded_end > c.policy.sinks)
      fail_internal(
          fmt::format("truncate to {} tokens: {} are coded; only exact tokens can be rolled back", n, s.coded_end));
  c.length = n;
  for (RoleStore& s : c.roles) c.drop_exact(s, s.exact_begin, n);
  c.forget_evictions(n);
}

void CompressedCache::evict(int layer, int kv_head, std::span<const int64_t> positions) {
  VQKV_CHECK(!impl_->open && layer >= 0 && layer < impl_->shape.layers && kv_head >= 0 &&
             kv_head < impl_->shape.kv_heads);
  if (!positions.empty()) impl_->evict(layer, kv_head, positions);
}

ByteLedger CompressedCache::bytes() const {
  const Impl& c = *impl_;
  ByteLedger b;
  const int64_t sinks = c.policy.sinks, total = c.length + c.pending, row = c.row_bytes();
  b.index += static_cast<int64_t>(c.roles.capacity() * sizeof(RoleStore) + c.stores.capacity() * sizeof(UnitStore) +
                                  c.evicted.capacity() * sizeof(EvictedSet));
  for (const EvictedSet& e : c.evicted) b.index += e.count * static_cast<int64_t>(sizeof(uint64_t));
  for (const RoleStore& s : c.roles) {
    if (s.sinks) {
      b.sinks += std::min(sinks, total) * row;
      b.padding += (sinks - std::min(sinks, total)) * row;
    }
    const int64_t held = std::max<int64_t>(0, total - std::max(sinks, s.exact_begin));
    b.window += held * row;
    b.padding += (s.chunks.count * kChunkTokens - held) * row;
    b.index += s.chunks.capacity * static_cast<int64_t>(sizeof(std::byte*));
  }
  for (size_t u = 0; u < c.units.size(); ++u) {
    const UnitStore& s = c.stores[u];
    const PageLayout& pages = *c.units[u].pages;
    const int64_t coded =
        std::max<int64_t>(0, c.roles[c.slot(c.units[u].shape.layer, c.units[u].shape.role)].coded_end - sinks);
    const int64_t codes = pages.code_bytes(coded) - s.dead_pages * pages.code_bytes(pages.tokens());
    const int64_t side = pages.side_bytes(coded) - s.dead_pages * pages.side_bytes(pages.tokens());
    b.codes += codes;
    b.side += side + s.state_bytes;
    b.padding += (s.pages.count - s.dead_pages) * pages.bytes() - codes - side;
    b.index += s.pages.capacity * static_cast<int64_t>(sizeof(std::byte*));
    b.overlay += s.overlay_count * static_cast<int64_t>(sizeof(StoredOverlay));
    b.padding += (s.overlay_capacity - s.overlay_count) * static_cast<int64_t>(sizeof(StoredOverlay));
  }
  if (c.codecs && c.codebook_bytes < 0) c.codebook_bytes = c.codecs->constant_bytes();
  b.codebooks = std::max<int64_t>(0, c.codebook_bytes);
  return b;
}

ByteLedger ledger_at(const CodecSet& codecs, const CachePolicy& policy, int64_t tokens) {
  VQKV_CHECK(tokens >= 0);
  const CacheShape& shape = codecs.shape();
  const int64_t row = int64_t{shape.kv_heads} * shape.head_dim * static_cast<int64_t>(dtype_size(policy.exact_dtype));
  const int64_t pointer = sizeof(std::byte*), units = static_cast<int64_t>(codecs.units().size());
  // What a role has coded and the index of the chunk that holds its first exact token, both counted after the sinks.
  const auto coded_of = [&](Role role) {
    return std::max<int64_t>(0, policy.coded_among(role, tokens) - policy.sinks);
  };
  ByteLedger b;
  b.index = 2 * shape.layers * static_cast<int64_t>(sizeof(RoleStore)) +
            units * static_cast<int64_t>(sizeof(UnitStore)) +
            int64_t{shape.layers} * shape.kv_heads * static_cast<int64_t>(sizeof(EvictedSet));
  const int64_t past = std::max<int64_t>(0, tokens - policy.sinks);
  for (const Role role : {Role::kKey, Role::kValue}) {
    const int64_t coded = coded_of(role), held = past - coded;
    const int64_t chunks = held == 0 ? 0 : (past + kChunkTokens - 1) / kChunkTokens - coded / kChunkTokens;
    b.window += shape.layers * held * row;
    b.padding += shape.layers * (chunks * kChunkTokens - held) * row;
    b.index += shape.layers * BlockTable::capacity_for(chunks) * pointer;
    if (tokens == 0) continue;
    b.sinks += shape.layers * std::min(policy.sinks, tokens) * row;
    b.padding += shape.layers * (policy.sinks - std::min(policy.sinks, tokens)) * row;
  }
  for (const TrainedUnit& u : codecs.units()) {
    const PageLayout pages(u.codec->layout());
    const int64_t coded = coded_of(u.spec.unit.role), count = (coded + pages.tokens() - 1) / pages.tokens();
    b.codes += pages.code_bytes(coded);
    b.side += pages.side_bytes(coded);
    b.padding += count * pages.bytes() - pages.code_bytes(coded) - pages.side_bytes(coded);
    b.index += BlockTable::capacity_for(count) * pointer;
  }
  b.codebooks = codecs.constant_bytes();
  return b;
}

}  // namespace vqkv
