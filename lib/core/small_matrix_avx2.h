// Blocks of kernels::transpose, in registers.
#pragma once
#include <cstdint>

namespace vqkv::kernels {

// Eight rows of eight numbers; `add` sums into what is there.
void transpose_8x8_avx2(const float* in, int64_t in_stride, float* out, int64_t out_stride, bool add);
// Eight rows of four.
void transpose_8x4_avx2(const float* in, int64_t in_stride, float* out, int64_t out_stride);

}  // namespace vqkv::kernels
