// Products with a weight matrix packed in panels. Internal to core/gemm.cpp.
#pragma once
#include <cstdint>

#include "core/dtype.h"
#include "core/view.h"

namespace vqkv {

// A panel is 64 outputs side by side, zeros beyond the last output: element (k, j) at k * 64 + j. In bf16 the elements
// of k and k + 1 are neighbours, at (k / 2) * 128 + 2 j + k % 2, and an odd depth ends in zeros: the bf16 dot product
// takes pairs, and widening them to fp32 costs a shift and a mask.
inline constexpr int64_t kPanelWidth = 64;

// What of a panel stays in the second-level cache while all rows of x pass; sums of deeper panels wait in y.
inline constexpr int64_t kPanelBytes = int64_t{384} << 10;

struct PanelProduct {
  const void* panel = nullptr;  // float or bf16, (depth, 64)
  DType type = DType::kF32;
  int64_t depth = 0;
  const float* x = nullptr;         // (rows, depth)
  const bf16* x_rounded = nullptr;  // (rows, depth rounded up to even) instead of x: bf16 products
  int64_t x_stride = 0;
  int64_t rows = 0;
  float* y = nullptr;  // (rows, cols)
  int64_t y_stride = 0;
  int64_t cols = 0;  // 1..64
  bool accumulate = false;
};

// y = [y +] x * panel. Every sum is one chain in the order of k, whatever the number of rows, so that a row alone and
// the same row in a block have the same bits: of s <- fma(x[k], w[k], s) on every processor with fused multiply-add, or
// of the processor's bf16 dot products of pairs.
void multiply_panel(const PanelProduct& p);

// AVX512-BF16 alone (core/cpu.h): y (rows, 64) = x * panel over `pairs` pairs of k, or y += it.
// Strides in elements, x_stride even; sums that are added lie in one piece of kPanelBytes.
void multiply_panel_bf16(const bf16* panel, int64_t pairs, const bf16* x, int64_t x_stride, int64_t rows, float* y,
                         int64_t y_stride, bool add);

}  // namespace vqkv
