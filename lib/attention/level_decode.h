// Attention of one query a sequence and head over levels of 2 or 4 bits, on a device, on the codes themselves: keys
// scaled by channel in groups of 32 tokens, values by token in groups of 32 channels, as KIVI has them.
#pragma once
#include <cstdint>

#include "attention/exact_rows.h"
#include "attention/split_states.h"

namespace vqkv {

inline constexpr int kLevelTile = 32;  // tokens, and channels of a group of values
inline constexpr int kLevelGroup = 8;  // query heads a KV head, at most

// Everything of a tile lies in the order in which lanes hold the matrices of tensor cores: no code is moved between
// them.
struct LevelDecode {
  const float* queries = nullptr;  // (sequences, kv_heads, group, head_dim), times log2(e) / sqrt(head_dim)
  // (tiles, kv_heads, head_dim * bits words of 32 bits): code at level_key_place, level_value_place.
  const uint32_t* key_codes = nullptr;
  const uint32_t* value_codes = nullptr;
  // f16: (tiles, kv_heads, 2 * head_dim): scale and zero of a channel at level_key_side, of a token and group at
  // level_value_side. A number is scale * code + zero.
  const uint16_t* key_sides = nullptr;
  const uint16_t* value_sides = nullptr;
  const int32_t* tile_table = nullptr;  // (sequences, most_tiles): tiles in the order of their tokens
  const int32_t* lengths = nullptr;  // (sequences): coded tokens; with the exact ones 1 or more. Sides beyond: finite
  float* out = nullptr;              // (sequences, kv_heads, group, head_dim)
  int sequences = 0, kv_heads = 0, group = 0, most_tiles = 0;
  ExactRows exact = {};  // in the same launch
};

// Bits [shift, shift + bits) of a word of a tile.
struct LevelPlace {
  int word = 0, shift = 0;
};
// Rows of 32 in two blocks of 16, columns in steps of 16: of keys tokens and channels; values are the other way round.
inline constexpr LevelPlace level_place(int bits, int steps, int block, int row, int step, int column) {
  const int lane = row % 8 * 4 + column % 8 / 2, pair = row / 8 + column / 8 * 2;
  const int word = bits == 4 ? block * steps + step : step, at = bits == 4 ? pair : block * 4 + pair;
  return {(word / 4 * 32 + lane) * 4 + word % 4, at * bits + column % 2 * 16};
}
inline constexpr LevelPlace level_key_place(int bits, int head_dim, int token, int channel) {
  return level_place(bits, head_dim / 16, token / 16, token % 16, channel / 16, channel % 16);
}
inline constexpr LevelPlace level_value_place(int bits, int head_dim, int token, int channel) {
  return level_place(bits, head_dim / 16, token / 16, channel % 16, channel / 16, token % 16);
}
// The half of a scale (zero: of a zero) among those of a tile.
inline constexpr int level_side(int index, int column) {
  return (index / 4 * 4 + column % 8 / 2) * 8 + index % 4 * 2 + column % 2;
}
inline constexpr int level_key_side(int head_dim, int channel, bool zero) {
  return level_side((zero ? head_dim / 8 : 0) + channel / 8, channel % 16);
}
inline constexpr int level_value_side(int head_dim, int token, int group, bool zero) {
  const int groups = head_dim / 32;
  return level_side(token / 16 * 4 * groups + (zero ? 2 * groups : 0) + group * 2 + token % 16 / 8, token % 16);
}

class LevelDecoder {
 public:
  // Contexts are cut into `splits` parts, one a block. kUsage for a group of more than eight query heads, and where no
  // kernel is compiled: for head_dim 64 and 128 at 2 and 4 bits.
  LevelDecoder(int sequences, int kv_heads, int group, int head_dim, int bits, int splits);
  void operator()(const LevelDecode& call);

 private:
  int head_dim_, bits_;
  SplitRoom room_;
};

}  // namespace vqkv
