// Nearest-codeword assignment: the hot step of training and of encoding.
#pragma once
#include <cstdint>

#include "codec/train/assign_tile.h"
#include "core/view.h"

namespace vqkv {

// A codebook packed for assignment. Scores are |c|^2/2 - x.c in fp32 after the codebook's mean is taken from both,
// since keys may sit far from the origin and the two terms would cancel. Each row is scored channel by channel in one
// fixed order, so its result depends on neither its neighbours, nor the chunking, nor the thread count. Ties go to the
// lowest index. Codes may differ between instruction sets where two codewords are equally near to within rounding.
class Assigner {
 public:
  Assigner() = default;
  explicit Assigner(ConstMatrix codewords);  // (entries, width), finite

  int64_t entries() const { return entries_; }
  int64_t width() const { return width_; }

  // Rows of x (n, width): index (n) of the nearest codeword, and its squared distance (n) unless null. Uses the pool.
  void assign(ConstMatrix x, int32_t* index, float* distance = nullptr) const;

  // The same on this thread alone.
  void assign_rows(ConstMatrix x, int32_t* index, float* distance = nullptr) const;

 private:
  int64_t entries_ = 0;
  int64_t width_ = 0;
  AlignedVector<float> offset_;  // (width) mean codeword
  AlignedVector<float> packed_;  // (blocks, width, 8): eight codewords side by side
  assign::Bf16Screen screen_;
  AlignedVector<float> half_norm_;  // (blocks * 8), infinite for padding
};

}  // namespace vqkv
