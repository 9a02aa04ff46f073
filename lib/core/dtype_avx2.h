// Conversions by AVX2 and F16C. Each converts whole vectors from the front and returns how many numbers those held.
#pragma once
#include <cstdint>

#include "core/dtype.h"

namespace vqkv {

int64_t widen_f16_avx2(const f16* in, float* out, int64_t n);
int64_t narrow_f16_avx2(const float* in, f16* out, int64_t n);
int64_t widen_bf16_avx2(const bf16* in, float* out, int64_t n);
int64_t narrow_bf16_avx2(const float* in, bf16* out, int64_t n);

}  // namespace vqkv
