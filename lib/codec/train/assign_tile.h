// One tile of rows against a packed codebook. Internal to codec/train/assign*.cpp.
#pragma once
#include <cstdint>
#include <vector>

#include "core/view.h"

namespace vqkv::assign {

// 64 rows are scored together, transposed so that a SIMD lane is a row: the codeword element is broadcast, and the best
// score and index of a row stay in one lane, without a horizontal step.
inline constexpr int64_t kTile = 64;
inline constexpr int64_t kBlock = 8;  // codewords scored together

struct TileJob {
  ConstMatrix x;                  // (up to kTile, channels) the rows, and
  const float* offset = nullptr;  // (channels) what is taken from them: the mean codeword
  const float* tile = nullptr;    // (channels, kTile) both, transposed; zeros past the last row
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

// How far a bf16 score of a block of codewords may lie from the fp32 score: |x| by_length + |x - bf16(x)| by_loss +
// offset.
struct Bf16Bound {
  float by_length = 0, by_loss = 0, offset = 0;
};

// A codebook in bf16, to find the few blocks of eight codewords that can hold a row's nearest. A product of two bf16
// pairs is one instruction, so this search costs half the arithmetic of fp32 scores; the blocks that survive are scored
// in fp32 by the same chain of multiply-adds as without it, and the result has the same bits.
//
// The score of a row x and a codeword c is |c|^2/2 - x.c. With x' and c' rounded to bf16, |x.c - x'.c'| is at most
// |x - x'| |c| + |x'| |c - c'| (Cauchy-Schwarz) with |x'| <= |x| (1 + 2^-8). What rounding took is measured, since it
// is mostly under half of what it might take. Sums of d terms in fp32, on both sides, add 4 (d + 4) 2^-24 (|x| |c| +
// |c|^2/2). 2^-110 covers denormals, which the instruction takes for zero, and 2^-69 |c| squares that vanish in the
// lengths.
//
// AMX multiplies 16 codewords by 16 rows over 32 channels in one instruction; the sums come in another order, which the
// bound covers.
class Bf16Screen {
 public:
  // packed (blocks, channels, kBlock), half_norm (blocks * kBlock), infinite for padding. Empty where the processor
  // lacks both instructions, or the shape gains nothing.
  Bf16Screen() = default;
  Bf16Screen(const float* packed, int64_t blocks, int64_t channels);
  bool empty() const { return pairs_.empty(); }

  // best and best_index of the rows, as the fp32 scores give them; false, and nothing done, where a row is too long for
  // the bound (|x| over 1e18).
  bool nearest(const TileJob& job) const;

 private:
  // Two channels of -c each: (blocks, channels / 2 rounded up, kBlock); for AMX (blocks / 2, channels / 32, 16
  // codewords, 16 pairs), both rounded up, zeros beyond.
  AlignedVector<uint32_t> pairs_;
  std::vector<Bf16Bound> bound_;  // (blocks)
  bool tiles_ = false;            // pairs_ as AMX takes them
};

// assign_bf16.cpp; only where cpu_features().bf16_products or amx.
struct Bf16Job {
  const TileJob* exact = nullptr;
  const uint32_t* pairs = nullptr;
  const Bf16Bound* bound = nullptr;
  bool tiles = false;  // Bf16Screen::tiles_
};
uint32_t bf16_pair(float low, float high);
bool nearest_bf16(const Bf16Job& job);

// assign_amx.cpp; only where cpu_features().amx. rows: (pairs of channels rounded up to 16, kTile) bf16 pairs, zeros
// beyond the channels; length, lost: (kTile) of the rows and of what rounding took. low: (blocks, kTile) lower bounds
// of every block's best score; upper: (kTile) upper bound of each row's best.
void screen_amx(const Bf16Job& job, const uint32_t* rows, const float* length, const float* lost, float* low,
                float* upper);

}  // namespace vqkv::assign
