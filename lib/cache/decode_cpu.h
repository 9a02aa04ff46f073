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

}  // namespace vqkv::kernels
