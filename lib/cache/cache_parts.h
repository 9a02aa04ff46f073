// The inside of a CompressedCache: its model, map and store at work on one sequence.
#pragma once
#include <cstdint>
#include <memory>
#include <memory_resource>
#include <span>
#include <vector>

#include "cache/cache.h"
#include "cache/map.h"
#include "cache/store.h"

namespace vqkv {

struct CompressedCache::Parts {
  Parts(std::shared_ptr<const CacheModel> of_model, CachePolicy policy, std::pmr::memory_resource* memory)
      : model(std::move(of_model)), map(model, policy, memory), store(memory) {}
  ~Parts();
  Parts(const Parts&) = delete;
  Parts& operator=(const Parts&) = delete;

  // Room for the exact rows of tokens [0, tokens).
  void grow_chunks(RoleMap& role, int64_t tokens);
  // Releases the blocks before `first` on the table's grid.
  void drop_front(BlockTable& table, int64_t first, int64_t bytes);
  // Keeps exact tokens [begin, tokens) beyond the sinks.
  void drop_exact(RoleMap& role, int64_t begin, int64_t tokens);
  void free_blocks(const BlockTable& table, int64_t bytes) {
    for (int32_t i = 0; i < table.count; ++i) store.release(table.blocks[i], bytes);
  }
  int64_t chunk_bytes() const { return kChunkTokens * map.row_bytes(); }

  // Codes what `layers` hold exactly up to the ends of their roles, of `tokens` tokens.
  void code(std::span<const int> layers, int64_t tokens, int64_t k_end, int64_t v_end);
  void fit(std::span<const size_t> units, int64_t tokens);
  // Holds what `q`, queries of the open block, has for the codecs of a layer that are still to be fitted.
  void hold_queries(int layer, ConstMatrix q);
  void keep_queries(int layer, int64_t count);  // the first of those held, with room for so many
  // Passes what is old enough among `tokens` tokens on to the next tiers; the newer form stays.
  void age(std::span<const int> layers, int64_t tokens);
  // Gives up what passed on.
  void drop_aged();
  // Codes what the policy says of all tokens that are held, and drops their exact rows.
  void settle();
  // Tokens [from, to) go to `slot` and those after it.
  struct Run {
    int64_t from, to, slot;
  };
  // Codes into pages that are there; exceptions are returned.
  std::vector<OverlayEntry> encode(size_t unit, const Run& run);
  // The exceptions of slots [slot, slot + tokens), behind all others.
  void add_overlay(size_t unit, int64_t slot, int64_t tokens, std::span<const OverlayEntry> entries);
  // What of [from, to) some head of the unit still sees, in whole codec blocks.
  std::vector<Run> survivors(size_t unit, int64_t from, int64_t to) const;
  // Room for the slots of `runs`, the survivors of `tokens` tokens, and their positions.
  void make_room(size_t unit, int64_t tokens, std::span<const Run> runs);
  void resize_overlay(UnitMap& unit, int64_t capacity);
  void drop_overlay(UnitMap& unit, int64_t count);  // the first ones
  // Codec blocks from `first` on, into zeroed places.
  void store_blocks(size_t unit, int64_t first, const CodeBlock& codes);
  // Gives up the slots that no head of the unit sees any more: the others move together, pages behind them are freed.
  void compact(size_t unit);

  // The policy's rule decides at the end of the open block.
  void decide();

  std::shared_ptr<const CacheModel> model;
  SequenceMap map;
  HostStore store;
  double encode_seconds = 0;
  std::vector<float> staging;  // rotated keys of one append; freed by end_block
};

}  // namespace vqkv
