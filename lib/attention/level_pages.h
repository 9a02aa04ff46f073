// From what a codec wrote to the tiles that kernels of a device read (attention/level_decode.h).
#pragma once
#include <cstdint>
#include <span>
#include <string>

#include "codec/codec.h"

namespace vqkv {

// Why the kernels of levels can't attend over what `plan` decodes, of a unit in heads of head_dim channels, or "": they
// take codes of 2 or 4 bits as numbers, a scale and a zero for each channel of 32 tokens (keys), or for each token and
// 32 channels (values), stored as f16, after RoPE, and nothing around them.
std::string level_tiles_reason(const DecodePlan& plan, Role role, int head_dim);

// Tokens [first, first + 32) of `codes`, head `head` of the unit: words (head_dim * bits) and sides (2 * head_dim
// halves), both written whole. first is a multiple of 32; tokens beyond the last are zeros.
void pack_level_tile(const DecodePlan& plan, const CodeBlock& codes, Role role, int64_t first, int head, int head_dim,
                     std::span<uint32_t> words, std::span<uint16_t> sides);

}  // namespace vqkv
