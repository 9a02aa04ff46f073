// Where bytes lie inside a cache. Exact rows live in chunks of kChunkTokens tokens, coded tokens in pages of P tokens.
//
// Both grids start at the first token after the sinks, so a window that moves in steps of a multiple of the chunk
// leaves no dead rows in front. Inside a page every field is slot-major and token-minor: the P codes of one slot are
// consecutive, packed at their width, so that a scan over tokens reads one stream a slot (8-bit slots: P bytes).
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "codec/code_block.h"
#include "core/dtype.h"

namespace vqkv {

constexpr int64_t kChunkTokens = 32;  // 12 KiB a chunk at 3 heads x 64 in f16; half a chunk of padding on average

// One exact exception as stored. Those of a unit lie in the order of their tokens; pages say where each token's begin.
struct StoredOverlay {
  uint16_t channel = 0;  // bit 15: add
  f16 value{};
};
static_assert(8 * sizeof(StoredOverlay) == CodeLayout::kExceptionBits);

class PageLayout {
 public:
  explicit PageLayout(const CodeLayout& layout);

  int64_t tokens() const { return tokens_; }  // P = lcm(64, block_tokens)
  int64_t bytes() const { return bytes_; }    // of one page
  int64_t blocks() const { return tokens_ / layout_.block_tokens; }
  const CodeLayout& layout() const { return layout_; }

  // Byte offset of the codes (values) of one slot within a page.
  int64_t field_offset(int field, int slot) const { return field_[at(field)] + slot * field_stride_[at(field)]; }
  int64_t side_offset(int side, int slot) const { return side_[at(side)] + slot * side_stride_[at(side)]; }

  // Bytes that `tokens` coded tokens (a multiple of block_tokens) put to use; the rest of their pages is padding.
  int64_t code_bytes(int64_t coded) const {
    return (layout_.code_bits_per_block() * (coded / layout_.block_tokens) + 7) / 8;
  }
  int64_t side_bytes(int64_t coded) const { return layout_.side_bits_per_block() * (coded / layout_.block_tokens) / 8; }
  int64_t pointer_bytes(int64_t coded) const { return layout_.overlay ? coded * int64_t{sizeof(uint32_t)} : 0; }

  // Of a layout with an overlay: for each token of the page, how many exceptions the unit was given before those of the
  // token (UnitMap::overlay_dropped of them are gone).
  uint32_t* exception_pointers(std::byte* page) const { return reinterpret_cast<uint32_t*>(page); }
  const uint32_t* exception_pointers(const std::byte* page) const { return reinterpret_cast<const uint32_t*>(page); }

  // Writes blocks [first, first + count) of `from` into the page at block `at_block`. The bits are or-ed in: a page
  // starts zeroed and every place is written once.
  void store(std::byte* page, int64_t at_block, const CodeBlock& from, int64_t first, int64_t count) const;
  // The inverse: `count` blocks into `to` (already resized) at block `first`. Overlays are kept elsewhere.
  void fetch(const std::byte* page, int64_t at_block, CodeBlock& to, int64_t first, int64_t count) const;

  // Codes [first, first + count) of one slot's run (tokens, or blocks for a per-block field).
  void codes(const std::byte* page, int field, int slot, int64_t first, int64_t count, uint16_t* out) const;
  // Side values, widened.
  void side(const std::byte* page, int side, int slot, int64_t first, int64_t count, float* out) const;

 private:
  static size_t at(int i) { return static_cast<size_t>(i); }
  CodeLayout layout_;
  int64_t tokens_ = 0;
  int64_t bytes_ = 0;
  std::vector<int64_t> field_, field_stride_, side_, side_stride_;
};

}  // namespace vqkv
