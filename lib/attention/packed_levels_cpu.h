// Sums over levels of packed codes, of several rows at once: a vector of codes is unpacked in registers and serves all
// query heads of a group before the next one is read. Scales and zeros are the caller's: a scale goes into the other
// factor, a zero into a sum of its own (fold_line).
//
// Each sum is fp32, in index order. Where vectors hold 16 numbers (AVX-512) codes are read four bits at a time: the sum
// of a row over the codes that four bits hold is one of 16, found by a permute. Elsewhere codes become levels first.
// The two differ by fp32 rounding; for one row, neither depends on the rows beside it.
#pragma once
#include <cstdint>

namespace vqkv::kernels {

constexpr int64_t kLevelRun = 32;    // tokens of a run: `bits` 32-bit words of codes
constexpr int64_t kNibbleCodes = 4;  // codes that four bits hold at most

// Codes of `bits` bits (1, 2 or 4), lowest bits first: those of channel c from codes + c * stride on.
struct PackedLevels {
  const uint8_t* codes = nullptr;
  int64_t stride = 0;  // bytes from one channel to the next
  int bits = 0;
  bool even = false;  // level = code - offset
  float offset = 0;
  // level[k][i]: of code k of the four bits i, which hold 4 / bits of them.
  alignas(64) float level[kNibbleCodes][16] = {};
};

// out[r * out_stride + t] = base[r] + the sum over channels of q[r * q_stride + c] * level(c, t), t < kLevelRun, of the
// run that begins at p.codes. q holds zeros from `channels` up to a multiple of kNibbleCodes.
void score_levels(const PackedLevels& p, const float* q, int64_t q_stride, int64_t rows, int64_t channels,
                  const float* base, float* out, int64_t out_stride);

// words[w * stride + c] = 32-bit word w < count of channel c < channels, and 0 for c in [channels, stride).
void turn_words(const PackedLevels& p, int64_t channels, int64_t count, uint32_t* words, int64_t stride);

// y[r * y_stride + c] += the sum over t in [first, end) of w[r * w_stride + t] * level(c, t), c < channels; words by
// turn_words, p.codes is not read. Channels up to the next multiple of 16 may be written. w holds zeros from `first`
// down and from `end` up to a multiple of kNibbleCodes.
void sum_levels(const PackedLevels& p, const uint32_t* words, int64_t stride, const float* w, int64_t w_stride,
                int64_t rows, int64_t first, int64_t end, int64_t channels, float* y, int64_t y_stride);

// out[r * out_stride + i] = x[r * x_stride + i] * scale[i]; sums[r] += x[r] . zero. i < n; up to 15 zeros may
// be written behind.
void fold_line(const float* x, int64_t x_stride, int64_t rows, const float* scale, const float* zero, int64_t n,
               float* out, int64_t out_stride, float* sums);

}  // namespace vqkv::kernels
