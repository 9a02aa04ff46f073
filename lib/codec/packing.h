// Bit packing: code i of b bits occupies bits [i*b, (i+1)*b) of a little-endian bit string, as in KIVI's and GGUF's
// packed words. The one packed form of the project: caches, archives and kernels share it.
#pragma once
#include <cstdint>

namespace vqkv {

constexpr int kPackGroup = 64;  // a group of 64 codes of b bits is exactly 8*b bytes: always byte-aligned

// Codes [first, first + n) of a packed string, from any bit offset.
void unpack_bits_at(const uint8_t* in, int64_t first, int64_t n, int bits, uint16_t* codes);

// One group of 64 codes: 8*bits bytes, no alignment needed. The 8-bit forms take bits 1..8. Codes above the width are
// cut by pack64 (the caller holds codes that encode checked).
void pack64(const uint16_t* codes, int bits, uint8_t* out);
void pack64(const uint8_t* codes, int bits, uint8_t* out);
void unpack64(const uint8_t* in, int bits, uint16_t* codes);
void unpack64(const uint8_t* in, int bits, uint8_t* codes);

}  // namespace vqkv
