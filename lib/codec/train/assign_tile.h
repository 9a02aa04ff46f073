// One tile of rows against a packed codebook. Internal to codec/train/assign*.cpp.
#pragma once
#include <cstdint>

#include "core/view.h"

namespace vqkv::assign {

// 64 rows are scored together, transposed so that a SIMD lane is a row: the codeword element is broadcast, and the best
// score and index of a row stay in one lane, without a horizontal step.
inline constexpr int64_t kTile = 64;
inline constexpr int64_t kBlock = 8;  // codewords scored together

struct TileJob {
  const float* tile = nullptr;  // (channels, kTile)
  int64_t channels = 0;
  const float* packed = nullptr;  // block b starts at b * packed_stride
  int64_t packed_stride = 0;
  const float* half_norm = nullptr;
  int64_t blocks = 0;
  float* scores = nullptr;  // (blocks * kBlock, kTile) partial scores, or null when one pass does
  bool first = true, last = true;
  float* best = nullptr;  // (kTile)
  int32_t* best_index = nullptr;
};

// A codebook in bf16, to find the few blocks of eight codewords that can hold a row's nearest. A product of two bf16
// pairs is one instruction, so this search costs half the arithmetic of fp32 scores; the blocks that survive are scored
// in fp32 by the same chain of multiply-adds as without it, and the result has the same bits.
//
// Score of a row x and a codeword c: |c|^2/2 - x.c. Each operand is rounded to bf16 (relative 2^-8), sums are fp32, so
//   |approximate - fp32| <= |x| slope + offset,   slope  = |c| (2^-7 + 2^-15 + 4 (d + 4) 2^-24) + 2^-110,
//                                                 offset = 4 (d + 4) 2^-24 |c|^2/2 + 2^-110 (1 + |c|),
// by Cauchy-Schwarz, with the largest |c| of a block; 2^-110 covers the denormals that the instruction takes for zero.
class Bf16Screen {
 public:
  // packed (blocks, channels, kBlock), half_norm (blocks * kBlock), infinite for padding. Empty where the processor
  // lacks the instruction, or the shape gains nothing.
  Bf16Screen() = default;
  Bf16Screen(const float* packed, int64_t blocks, int64_t channels);
  bool empty() const { return pairs_.empty(); }

  // best and best_index of all rows, as the fp32 scores give them; false, and nothing done, where a row is too long for
  // the bound (|x| over 1e18).
  bool nearest(const TileJob& job) const;

 private:
  AlignedVector<uint32_t> pairs_;        // (blocks, channels / 2 rounded up, kBlock): two channels of -c
  AlignedVector<float> slope_, offset_;  // (blocks)
};

// assign_bf16.cpp; only where cpu_features().avx512_bf16.
struct Bf16Job {
  const TileJob* exact = nullptr;
  const uint32_t* pairs = nullptr;
  const float* slope = nullptr;
  const float* offset = nullptr;
};
uint32_t bf16_pair(float low, float high);
bool nearest_bf16(const Bf16Job& job);

}  // namespace vqkv::assign
