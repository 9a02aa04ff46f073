// Inside of CompressedCache, for the attention backends. Everything a sequence owns is allocated from the cache's
// memory resource; plans and shapes are model-side and are not.
#pragma once
#include <cstddef>
#include <memory>
#include <memory_resource>
#include <span>
#include <vector>

#include "cache/cache.h"
#include "cache/layout.h"
#include "cache/tile_decoder.h"

namespace vqkv {

// A table of blocks that come at the back and leave at the front. Its capacity is a pure function of how many blocks
// are live, so that the ledger of any length can be computed without a history.
struct BlockTable {
  std::byte** blocks = nullptr;
  int32_t count = 0;
  int32_t capacity = 0;
  int64_t first = 0;  // index of blocks[0] on its grid
  static int64_t capacity_for(int64_t live) { return (live + 7) / 8 * 8; }
  std::byte* at(int64_t index) const { return blocks[index - first]; }
};

// Exact and coded extent of one (layer, role).
//   [0, S) sinks, exact for ever · [S, coded_end) coded · [exact_begin, tokens) exact; the two overlap inside a block
//   only
struct RoleStore {
  std::byte* sinks = nullptr;
  BlockTable chunks;
  int64_t exact_begin = 0;
  int64_t coded_end = 0;
};

// One exact exception as stored: 8 bytes.
struct StoredOverlay {
  int32_t token = 0;     // from the first coded token of the sequence
  uint16_t channel = 0;  // bit 15: add
  f16 value{};
};

// Tokens of one (layer, head) that a policy took out: a bit a position. No words: nothing was evicted.
struct EvictedSet {
  uint64_t* words = nullptr;
  int64_t count = 0;  // words
  bool contains(int64_t position) const {
    return position / 64 < count && (words[position / 64] >> (position % 64) & 1) != 0;
  }
};

// Coded tokens of one unit.
struct UnitStore {
  BlockTable pages;  // null where a page died of eviction
  int64_t dead_pages = 0;
  StoredOverlay* overlay = nullptr;
  int64_t overlay_count = 0, overlay_capacity = 0;
  std::byte* state_charge = nullptr;  // the bytes of `state`, drawn from the resource so that they are counted
  int64_t state_bytes = 0;
};

// Model-side facts of a unit, shared by nothing that a sequence owns.
struct UnitFacts {
  UnitShape shape;
  const Codec* codec = nullptr;
  DecodePlan plan;  // of the fitted state once there is one
  std::shared_ptr<const PageLayout> pages;
  std::unique_ptr<SequenceState> state;
  std::vector<TileDecoder> decoders;  // one a head
  void prepare();                     // decoders from `plan`
};

struct CompressedCache::Impl {
  Impl(const CacheShape& shape, CachePolicy policy, std::shared_ptr<const CodecSet> codecs,
       std::pmr::memory_resource* memory);
  ~Impl();
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  // One (layer, role, head): unit index or -1 in a cache without codecs.
  int unit_of(int layer, int head, Role role) const {
    return unit_index[slot(layer, role) * static_cast<size_t>(shape.kv_heads) + static_cast<size_t>(head)];
  }
  size_t slot(int layer, Role role) const { return static_cast<size_t>(2 * layer + (role == Role::kValue)); }
  const EvictedSet& evicted_set(int layer, int head) const {
    return evicted[static_cast<size_t>(layer * shape.kv_heads + head)];
  }
  const RoleStore& role_store(int layer, Role role) const { return roles[slot(layer, role)]; }
  bool keys_post_rope(int layer, int head) const {
    const int u = unit_of(layer, head, Role::kKey);
    return u < 0 || units[static_cast<size_t>(u)].plan.rope == RopePlacement::kPost;
  }

  int64_t element() const { return static_cast<int64_t>(dtype_size(policy.exact_dtype)); }
  int64_t row_bytes() const { return int64_t{shape.kv_heads} * shape.head_dim * element(); }

  // Decoder and store of a head's codes; only in a cache with codecs.
  const TileDecoder& decoder(int layer, int head, Role role) const {
    const UnitFacts& u = units[static_cast<size_t>(unit_of(layer, head, role))];
    return u.decoders[static_cast<size_t>(head - u.shape.first_head)];
  }
  const UnitStore& store(int layer, int head, Role role) const {
    return stores[static_cast<size_t>(unit_of(layer, head, role))];
  }

  // Exact rows of a head, tokens [first, first + count), none of them coded away. Keys come transposed:
  // out[channel * stride + i]; values as rows: out[i * stride + channel]. fp32.
  void load_keys(int layer, int head, int64_t first, int64_t count, float* out, int64_t stride) const;
  void load_values(int layer, int head, int64_t first, int64_t count, float* out, int64_t stride) const;

  // All coded tokens of a unit, unpacked: for the reference backend and for judging, never on a fast path.
  CodeBlock fetch_codes(size_t unit) const;

  // Coding and upkeep.
  void evict(int layer, int head, std::span<const int64_t> positions);
  void forget_evictions(int64_t from);
  void store_exact(int layer, Role role, int head, ConstMatrix rows, int64_t first_token);
  void grow_chunks(RoleStore& store, int64_t tokens);
  void drop_exact(RoleStore& store, int64_t begin, int64_t tokens);
  void code_role_units(const std::vector<int>& layers, int64_t tokens, int64_t k_end, int64_t v_end);
  void encode(size_t unit, int64_t from, int64_t to);
  void fit(size_t unit, int64_t tokens);
  int64_t whole_blocks(Role role, int64_t end) const;
  void resize_table(BlockTable& table, int64_t live);
  void free_table(BlockTable& table, int64_t block_bytes);
  std::byte* allocate(int64_t bytes) {
    return static_cast<std::byte*>(memory->allocate(static_cast<size_t>(bytes), 64));
  }
  void release(void* p, int64_t bytes) {
    if (p) memory->deallocate(p, static_cast<size_t>(bytes), 64);
  }

  CacheShape shape;
  CachePolicy policy;
  std::shared_ptr<const CodecSet> codecs;
  std::pmr::memory_resource* memory;
  std::shared_ptr<const RopeTable> rope;
  std::vector<int> unit_index;  // (layer, role, head)
  std::vector<UnitFacts> units;
  std::vector<std::vector<size_t>> layer_units;  // units of a layer, both roles
  int64_t block_tokens[2] = {1, 1};  // lcm over units, per role: a fake-quant tail shorter than this stays exact

  std::pmr::vector<RoleStore> roles;     // (layers * 2)
  std::pmr::vector<UnitStore> stores;    // (units)
  std::pmr::vector<EvictedSet> evicted;  // (layers * kv_heads)
  int64_t length = 0;
  int64_t pending = 0;  // tokens of the open block
  int appended = 0;     // layers of the open block that have theirs
  bool open = false, exact_prompt = false;
  Visibility visibility = Visibility::kReplay;
  mutable int64_t codebook_bytes = -1;  // constants of the codecs, asked for once
  double encode_seconds = 0;
  std::vector<float> staging;  // rotated keys of one append; freed by end_block
};

}  // namespace vqkv
