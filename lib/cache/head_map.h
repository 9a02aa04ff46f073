// The part of a unit's linear map that one head reads, as the CPU backends multiply with it.
#pragma once
#include <cstdint>

#include "codec/linear_map.h"
#include "core/view.h"

namespace vqkv {

// y (rows) of the code domain -> x (cols) of the head, from code channel first_row() of the unit on.
class HeadMap {
 public:
  HeadMap() = default;
  // Channels [first, first + cols) of the unit.
  HeadMap(const LinearMap& map, int code_channels, int first, int cols);

  int64_t first_row() const { return part_.row; }
  int64_t rows() const { return part_.rows; }
  // Identity and diagonal maps leave every channel in its place.
  bool moves() const { return moves_; }
  // A Hadamard map is applied where x lies, by turn().
  bool turns() const { return std::holds_alternative<HadamardMap>(part_.map); }
  // Of a diagonal map; else empty.
  const std::vector<float>& diagonal() const;

  // x (n, cols) = [x +] y (n, rows) * map. Columns of x up to the padded width may be written.
  void multiply(const float* y, int64_t y_stride, float* x, int64_t x_stride, int64_t n, bool accumulate) const;
  // y (n, rows) = x (n, cols) * map^T; y_stride is the padded width, zero behind rows().
  void fold(const float* x, int64_t x_stride, float* y, int64_t y_stride, int64_t n) const;
  // x = x * map in place, n tokens: x[t * stride + channel], or transposed x[channel * stride + t]. turns() only.
  void turn(float* x, int64_t stride, int64_t n, bool transposed) const;

  int64_t memory_bytes() const;

 private:
  MapSlice part_;
  int64_t cols_ = 0;
  bool moves_ = false;
  AlignedVector<float> wide_, tall_;  // dense and blocks: (rows, padded cols), (cols, padded rows)
};

}  // namespace vqkv
