// Attention of one query a sequence and head over product codes of keys and values, on a device, on the codes
// themselves.
#pragma once
#include <cstdint>

#include "attention/exact_rows.h"
#include "attention/split_states.h"

namespace vqkv {

inline constexpr int kPqEntries = 256, kPqTile = 32;
inline constexpr int kPqGroup = 4;  // query heads a KV head, at most

// `books` codebooks of 256 codewords of `width` channels for keys and for values each: head_dim = books * width.
struct PqDecode {
  const float* queries = nullptr;       // (sequences, kv_heads, group, head_dim), times log2(e) / sqrt(head_dim)
  const uint16_t* key_books = nullptr;  // f16: (kv_heads, books, 256, width)
  // f16: (kv_heads, books * 256, width): codewords where pq_value_slot says.
  const uint16_t* value_books = nullptr;
  // Codes in tiles of 32 tokens, (tiles, kv_heads, 32 * books): within a tile where pq_code_place says.
  const uint8_t* key_codes = nullptr;
  const uint8_t* value_codes = nullptr;
  const int32_t* tile_table = nullptr;  // (sequences, most_tiles): tiles in the order of their tokens
  const int32_t* lengths = nullptr;     // (sequences): coded tokens; with the exact ones 1 or more
  float* out = nullptr;                 // (sequences, kv_heads, group, head_dim)
  int sequences = 0, kv_heads = 0, group = 0, most_tiles = 0;
  ExactRows exact = {};  // in the same launch
};

// A lane of a warp is a book, of one token or, of 16 books, of one of two. Codewords stand so that 16 lanes of 8 bytes,
// or 8 of 16, read 128 bytes in a row of the same codeword, or of others at the same place in their rows: each bank
// once.
inline constexpr int pq_value_slot(int width, int book, int entry) {
  const int row = 64 / width;  // books
  return (book / row * kPqEntries + entry) * row + book % row;
}
// The code of a token of a tile and a book: each lane's 16 lie together.
inline constexpr int pq_code_place(int books, int token, int book) {
  const int at_once = 32 / books;
  const int place = at_once == 1 ? token / 16 : token % at_once, within = at_once == 1 ? token % 16 : token / at_once;
  return (place * books + book) * 16 + within;
}

// What kernels are compiled for: head_dim 128 at 2 bits and at 1, 64 at 2.
inline constexpr const char* kPqDecoderShapes = "32 of 4, 16 of 8 and 16 of 4";
inline constexpr bool pq_decoder_fits(int books, int width) {
  return (books == 32 && width == 4) || (books == 16 && (width == 4 || width == 8));
}

class PqDecoder {
 public:
  // Contexts are cut into `splits` parts, one a block. kUsage for a group of more than four query heads, and where no
  // kernel is compiled (pq_decoder_fits).
  PqDecoder(int sequences, int kv_heads, int group, int books, int width, int splits);
  void operator()(const PqDecode& call);

 private:
  int books_, width_;
  SplitRoom room_;
};

}  // namespace vqkv
