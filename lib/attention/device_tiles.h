// From what a codec wrote to the tiles that kernels of a device read (attention/level_decode.h, pq_decode.h).
#pragma once
#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include "codec/codec.h"

namespace vqkv {

// Which kernels take the codes of a unit.
struct TileFamily {
  enum class Kind : uint8_t { kLevels, kPq } kind = Kind::kLevels;
  int bits = 0;              // kLevels
  int books = 0, width = 0;  // kPq: of a head
  bool operator==(const TileFamily&) const = default;
  size_t code_bytes(int head_dim) const;   // of a tile of 32 tokens and a head
  size_t side_halves(int head_dim) const;  // likewise; 0: none
};
// Of heads of head_dim channels. None: no kernel takes them, and `why` says the reason.
std::optional<TileFamily> tile_family(const DecodePlan& plan, Role role, int head_dim, std::string& why);

// Why the kernels of levels can't attend over what `plan` decodes, of a unit in heads of head_dim channels, or "": they
// take codes of 2 or 4 bits as numbers, a scale and a zero for each channel of 32 tokens (keys), or for each token and
// 32 channels (values), stored as f16, after RoPE, and nothing around them.
std::string level_tiles_reason(const DecodePlan& plan, Role role, int head_dim);

// Tokens [first, first + 32) of `codes`, head `head` of the unit: words (head_dim * bits) and sides (2 * head_dim
// halves), both written whole. first is a multiple of 32; tokens beyond the last are zeros.
void pack_level_tile(const DecodePlan& plan, const CodeBlock& codes, Role role, int64_t first, int head, int head_dim,
                     std::span<uint32_t> words, std::span<uint16_t> sides);

// Likewise of product codes: 256 codewords a book in f16, the channels of a head in order, after RoPE, and nothing
// around them.
std::string pq_tiles_reason(const DecodePlan& plan, int head_dim);

// The books of a head as kernels of its role read them, (head_dim * 256) halves.
void pack_pq_books(const DecodePlan& plan, Role role, int head, int head_dim, std::span<uint16_t> out);

// Tokens [first, first + 32) of `codes`, head `head` of the unit: (32 * books) codes, written whole. first is a
// multiple of 32; tokens beyond the last have code 0.
void pack_pq_tile(const DecodePlan& plan, const CodeBlock& codes, int64_t first, int head, int head_dim,
                  std::span<uint8_t> out);

}  // namespace vqkv
