// Exact rows of a layer from places of its pages to others, on a device: how what is left behind codes stays together.
#pragma once
#include <cstdint>

namespace vqkv {

struct RowMove {
  int32_t from = 0, to = 0;  // tokens of the pages
};

struct RowMoves {
  uint16_t* keys = nullptr;  // (pages, kv_heads, kDevicePageTokens, head_dim), a sequence's pages in order
  uint16_t* values = nullptr;
  const RowMove* moves = nullptr;  // no place is both from and to
  int count = 0, kv_heads = 0, head_dim = 0;
};
void move_rows(const RowMoves& call);

}  // namespace vqkv
