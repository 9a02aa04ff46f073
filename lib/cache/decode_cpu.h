// What decodes tables and levels on the CPU (tile_decoder.h): vector kernels, chosen once at run time.
#pragma once
#include <cstdint>

namespace vqkv::kernels {

// rows[t * row_stride + i] = [+] words[codes[t] * word_stride + i], i < width.
void lookup_rows(const float* words, int64_t word_stride, const uint16_t* codes, int64_t count, int64_t width,
                 float* rows, int64_t row_stride, bool add);
// out[t] = [+] scale[t] * level(codes[t]) + zero[t]; level is levels[code], or code - offset without a table. scale and
// zero may be null (1 and 0).
void decode_levels(const uint16_t* codes, int64_t count, const float* levels, float offset, const float* scale,
                   const float* zero, float* out, bool add);
// Sums of complex codewords over stages s: out[t * out_stride] = [x 16, y 16] of [out +] Z_a + i Z_b, where
// words + s * entries * 32 is a book of rows [x 16, y 16], and a[s][t] and b[s][t] are its codes. Every sum is one
// chain in the order of stages.
void sum_pairs(const float* words, int64_t entries, const uint16_t* const* a, const uint16_t* const* b, int64_t stages,
               int64_t count, float* out, int64_t out_stride);

// The same of books of whole numbers, times `step`. No sum over stages may leave 16 bits. offsets (2 * stages, 64):
// where the codeword of a code, then of b, begins behind `words` for each of count <= 64 tokens.
void sum_pair_multiples(const int16_t* words, const uint32_t* offsets, int64_t stages, int64_t count, float step,
                        float* out, int64_t out_stride);

}  // namespace vqkv::kernels
