// Small matrices in rows padded to whole vectors, by the vectors of this processor, one set of kernels per generation,
// chosen once at run time. Inputs and outputs are the caller's; nothing is packed, and everything runs on one thread.
//
// Every output element is one chain of fused multiply-adds in index order, whatever the number of rows or the way a
// product is cut into column or depth ranges. That one rule gives three equalities bit for bit: identity codec = exact
// cache, block replay = stepwise replay, any thread count. A library product picks its summation order by shape.
#pragma once
#include <cstdint>

#include "core/round_up.h"

namespace vqkv::kernels {

constexpr int64_t kLane = 16;  // columns are padded to whole 512-bit vectors
inline int64_t padded(int64_t n) { return round_up(n, kLane); }

// c (m, n) = [c +] a (m, k) * b (k, n), rows contiguous; n a multiple of kLane.
void multiply(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t m, int64_t k,
              int64_t n, bool accumulate);
// x *= f
void scale_row(float* x, int64_t n, float f);
// out[c * out_stride + r] = [+] in[r * in_stride + c]
void transpose(const float* in, int64_t in_stride, int64_t rows, int64_t columns, float* out, int64_t out_stride,
               bool add);

}  // namespace vqkv::kernels
