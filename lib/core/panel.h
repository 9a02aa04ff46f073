// Products with a weight matrix packed in panels. Internal to core/gemm.cpp.
#pragma once
#include <cstdint>

#include "core/dtype.h"
#include "core/view.h"

namespace vqkv {

// A panel is 64 outputs side by side: element (k, j) at k * 64 + j, zeros beyond the last output.
inline constexpr int64_t kPanelWidth = 64;

struct PanelProduct {
  const void* panel = nullptr;  // float or bf16, (depth, 64)
  DType type = DType::kF32;
  int64_t depth = 0;
  const float* x = nullptr;  // (rows, depth)
  int64_t x_stride = 0;
  int64_t rows = 0;
  float* y = nullptr;  // (rows, cols)
  int64_t y_stride = 0;
  int64_t cols = 0;  // 1..64
  bool accumulate = false;
};

// y = [y +] x * panel. Every sum is one chain s <- fma(x[k], w[k], s) in the order of k, whatever the number of rows: a
// row alone and the same row in a block have the same bits, on every processor with fused multiply-add.
void multiply_panel(const PanelProduct& p);

}  // namespace vqkv
