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

// c (m, n) += a^T b: a (k, m) and b (k, n); any n. Two chains an element, of the even and of the odd rows: few rows and
// narrow b would wait for each other otherwise.
void multiply_transposed(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t m,
                         int64_t k, int64_t n);

// sums[s * sums_stride + codes[s * code_stride + t] * lanes + i] += weights[t * lanes + i], every s < slots, t < count,
// i < lanes; each element in the order of t. lanes is 1, 4, 8 or 16: one code is read for all of them.
void add_by_code(const float* weights, int64_t lanes, const uint16_t* codes, int64_t code_stride, int64_t slots,
                 int64_t count, float* sums, int64_t sums_stride);

// The mirror: out[t * lanes + i] = the sum over s < slots, in order, of
// words[s * words_stride + codes[s * code_stride + t] * lanes + i].
void sum_by_code(const float* words, int64_t words_stride, int64_t lanes, const uint16_t* codes, int64_t code_stride,
                 int64_t slots, int64_t count, float* out);

// Largest of s[0, n), n a multiple of kLane; NaN where one is NaN or +inf stands beside -inf.
float row_max(const float* s, int64_t n);
// s = exp(s - top) in place; -inf gives 0. Returns the sum.
float exp_row(float* s, int64_t n, float top);
// Sum of s[first, last).
float range_sum(const float* s, int64_t first, int64_t last);
// Smallest and largest of s[0, n), n > 0.
void value_range(const float* s, int64_t n, float* low, float* high);
// q = min(top, (x[i] - low) * inverse + 0.5) cut to a whole number, top < 65,536: its low byte, and where `upper` is
// not null its high byte. Without it also the extremes of x[i] - low - q * step, widened from what `under` and `over`
// hold. The same bits on every processor.
void quantize_row(const float* x, int64_t n, float low, float inverse, float top, uint8_t* lower, uint8_t* upper,
                  float step, float* under, float* over);
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
