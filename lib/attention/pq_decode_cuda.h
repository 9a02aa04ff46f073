// Attention of one query a sequence and head over product codes of keys and values, on a device, on the codes
// themselves.
#pragma once
#include <cstdint>

#include "device/runtime.h"

namespace vqkv {

// 32 codebooks of 256 codewords of 4 channels for keys and for values each: head_dim 128 at 2 bits.
struct PqDecode {
  const float* queries = nullptr;       // (sequences, kv_heads, group, 128), times log2(e) / sqrt(head_dim)
  const uint16_t* key_books = nullptr;  // f16: (kv_heads, 32 books, 256, 4)
  // f16: (kv_heads, 2, 256, 16, 4): codeword s of book b at (b / 16, s, b % 16), as lookups want them (pq_slots).
  const uint16_t* value_books = nullptr;
  // Codes in tiles of 32 tokens, (tiles, kv_heads, 2, 32 books, 16): token t of a tile at (t / 16, book, t % 16).
  const uint8_t* key_codes = nullptr;
  const uint8_t* value_codes = nullptr;
  const int32_t* tile_table = nullptr;  // (sequences, most_tiles): tiles in the order of their tokens
  const int32_t* lengths = nullptr;     // (sequences): tokens, 1 or more
  float* out = nullptr;                 // (sequences, kv_heads, group, 128)
  int sequences = 0, kv_heads = 0, group = 0, most_tiles = 0;
};

inline constexpr int kPqBooks = 32, kPqEntries = 256, kPqWidth = 4, kPqDim = kPqBooks * kPqWidth, kPqTile = 32;

// Where codeword s of book b stands among those of a head. 16 books of one codeword make 128 bytes, so that lanes, a
// book each, read each bank once.
inline constexpr int pq_slot(int book, int entry) { return (book / 16 * kPqEntries + entry) * 16 + book % 16; }

// Room for the states of splits, kept from launch to launch.
class PqDecoder {
 public:
  // Contexts are cut into `splits` parts, one a block. kUsage for a group of more than four query heads.
  PqDecoder(int sequences, int kv_heads, int group, int splits);
  void operator()(const PqDecode& call);

 private:
  int splits_;
  device::Buffer<float> out_, state_;
  device::Buffer<unsigned> arrived_;
};

}  // namespace vqkv
