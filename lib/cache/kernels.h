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

// rows[t * row_stride + i] = [+] words[codes[t] * word_stride + i], i < width.
void lookup_rows(const float* words, int64_t word_stride, const uint16_t* codes, int64_t count, int64_t width,
                 float* rows, int64_t row_stride, bool add);
// out[t] = [+] scale[t] * level(codes[t]) + zero[t]; level is levels[code], or code - offset without a table. scale and
// zero may be null (1 and 0).
void decode_levels(const uint16_t* codes, int64_t count, const float* levels, float offset, const float* scale,
                   const float* zero, float* out, bool add);
// out[c * out_stride + r] = [+] in[r * in_stride + c]
void transpose(const float* in, int64_t in_stride, int64_t rows, int64_t columns, float* out, int64_t out_stride,
               bool add);

}  // namespace vqkv::kernels
