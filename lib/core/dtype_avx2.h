// Conversions by AVX2 and F16C.
#pragma once
#include <cstdint>

#include "core/dtype.h"

namespace vqkv {

// Rows as to_float takes them, the first n / 8 * 8 numbers of each.
void widen_avx2(const f16* in, int64_t in_stride, float* out, int64_t out_stride, int64_t rows, int64_t n);
void widen_avx2(const bf16* in, int64_t in_stride, float* out, int64_t out_stride, int64_t rows, int64_t n);
// Whole vectors from the front; returns how many numbers those held.
int64_t narrow_f16_avx2(const float* in, f16* out, int64_t n);
int64_t narrow_bf16_avx2(const float* in, bf16* out, int64_t n);

}  // namespace vqkv
