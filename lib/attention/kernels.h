// Vector kernels of the CPU backends, one set per processor generation, chosen once at run time.
//
// Every output element is one chain of fused multiply-adds in index order, whatever the number of rows or the way a
// product is cut into column or depth ranges. That one rule gives three equalities bit for bit: identity codec = exact
// cache, block replay = stepwise replay, any thread count. A library product picks its summation order by shape.
#pragma once
#include <cstdint>

namespace vqkv::kernels {

constexpr int64_t kLane = 16;  // columns are padded to whole 512-bit vectors

// c (m, n) = [c +] a (m, k) * b (k, n), rows contiguous; n a multiple of kLane.
void multiply(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t m, int64_t k,
              int64_t n, bool accumulate);

// Largest of s[0, n); n a multiple of kLane.
float row_max(const float* s, int64_t n);
// s = exp(s - top) in place; -inf gives 0. Returns the sum.
float exp_row(float* s, int64_t n, float top);
// Sum of s[first, last).
float range_sum(const float* s, int64_t first, int64_t last);
// x *= f
void scale_row(float* x, int64_t n, float f);
// y += f * x
void add_scaled(const float* x, int64_t n, float f, float* y);

}  // namespace vqkv::kernels
