// What a codec writes and what a cache stores: integer fields, side scalars and an optional sparse overlay, in the
// open, so that one packer, one ledger and one set of kernels serve every method.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "core/dtype.h"

namespace vqkv {

// An integer field. A block of `tokens` tokens holds, for a per-token field, `slots` codes a token
// (slots * tokens codes); for a per-block field, `slots` codes a block.
struct FieldSpec {
  std::string name;
  int bits = 0;  // 1..16
  int slots = 0;
  bool per_token = true;
};

// A side scalar stored as `type`: scales, zeros, norms.
struct SideSpec {
  std::string name;
  DType type = DType::kF16;
  int slots = 0;
  bool per_token = true;  // else per block
};

// Exact layout of one block; every bit that a token costs follows from it.
struct CodeLayout {
  int block_tokens = 1;  // tokens coded together (KIVI keys: the group; most codecs: 1)
  std::vector<FieldSpec> fields;
  std::vector<SideSpec> sides;
  bool overlay = false;  // blocks may carry exact exceptions

  // What they cost: value and channel of each, and a pointer to the first of every token.
  static constexpr int kExceptionBits = 16 + 16, kExceptionPointerBits = 32;

  int64_t code_bits_per_block() const;  // integer fields
  int64_t side_bits_per_block() const;  // side scalars; the overlay is variable and counted as stored
  double bits_per_token() const;        // fields and sides, without the overlay
  double overlay_bits_per_token(double exceptions) const {  // of so many a token
    return overlay ? exceptions * kExceptionBits + kExceptionPointerBits : 0;
  }
};

// An exact exception: channel `channel` of token `token` (both relative to the CodeBlock). `add`: added to the decoded
// value; otherwise it replaces it. The value is one of f16, as it is stored. Applied in the domain of the codec's
// input, after every transform is undone.
struct OverlayEntry {
  int32_t token = 0;
  int32_t channel = 0;
  float value = 0;
  bool add = false;
  bool operator==(const OverlayEntry&) const = default;
};

// Unpacked codes of `blocks` consecutive blocks.
//   fields[f]: per-token (tokens, slots) row-major with tokens = blocks * block_tokens; per-block (blocks, slots).
//   sides[s]:  likewise; values already rounded to the side's type.
struct CodeBlock {
  int64_t blocks = 0;
  std::vector<std::vector<uint16_t>> fields;
  std::vector<std::vector<float>> sides;
  std::vector<OverlayEntry> overlay;  // sorted by (token, channel)

  void resize(const CodeLayout& layout, int64_t n_blocks);
};

}  // namespace vqkv
