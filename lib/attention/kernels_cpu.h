// Vector kernels of attention on the CPU beside those of core/small_matrix.h, by whose rule of summation they go.
#pragma once
#include <cstdint>

namespace vqkv::kernels {

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

// Logits of keys that are complex sums: out[r * out_stride + t] = the sum over pairs p of q . (k rotated), where k of
// token t is keys + t * 32 * blocks and q of row r is q + r * 32 * blocks, 16 pairs a block as [x 16, y 16], and the
// cos of pair p is phases[t * phase_stride + p], its sin `half` behind that. Floats behind the last pair may be read of
// phases: any finite ones, where keys or q are 0.
void score_pairs(const float* keys, const float* phases, int64_t phase_stride, int64_t half, const float* q,
                 int64_t blocks, int64_t rows, int64_t count, float* out, int64_t out_stride);

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
// y += f * x
void add_scaled(const float* x, int64_t n, float f, float* y);

}  // namespace vqkv::kernels
