// Beam search over residual stages.
#pragma once
#include <cstdint>
#include <vector>

#include "core/dtype.h"
#include "core/view.h"

namespace vqkv {

// Keeps the `beam` best partial sums after each stage. Two ways to score, chosen by the shape of the books alone, so
// that codes never depend on the machine's memory:
//   tables: all products x.c once, then c.c' of chosen codewords by table, 2 times faster than FAISS's same trick;
//   direct: residuals of every beam entry scored again, where the tables would pass kBeamTableBytes.
class BeamEncoder {
 public:
  BeamEncoder(const std::vector<Matrix<float>>& books, int beam);
  // Codes of stage i of row r go to codes[r * row_stride + i * stage_stride]. On this thread alone.
  void encode_rows(ConstMatrix x, uint16_t* codes, int64_t row_stride, int64_t stage_stride) const;
  bool uses_tables() const { return !tables_.empty(); }

 private:
  void encode_tile(ConstMatrix x, uint16_t* codes, int64_t row_stride, int64_t stage_stride) const;

  int stages_ = 0;
  int beam_ = 1;
  int64_t entries_ = 0;
  int64_t padded_ = 0;  // entries rounded up to whole panels
  int64_t width_ = 0;
  AlignedVector<float> offset_;               // (width) mean of the first book, taken from it and from x
  std::vector<AlignedVector<float>> packed_;  // a stage: (panels, width, 64)
  std::vector<AlignedVector<float>> half_norm_;
  // Stage i: (i * entries, padded) of -c.c' / table_unit_, rows by (earlier stage, code). Halves: the search is bound
  // by the cache misses of these rows, and the order of near ties is all that the rounding can change.
  std::vector<AlignedVector<f16>> tables_;
  float table_unit_ = 1;  // a power of two
};

// Tables are kept with every codec of every head: 8 x 256 takes 3.5 MiB, 630 MiB for the 180 codecs of a small model.
inline constexpr int64_t kBeamTableBytes = int64_t{8} << 20;

}  // namespace vqkv
