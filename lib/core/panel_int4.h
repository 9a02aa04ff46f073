// Panels of weights in 4 bits, as the drafts of self-speculative decoding read them. Internal to core/gemm.cpp.
#pragma once
#include <cstddef>
#include <cstdint>

#include "core/panel.h"

namespace vqkv {

// 64 outputs side by side (core/panel.h). First a scale (f16) for each group of `group` inputs of an output, (groups,
// 64); then codes, two inputs a byte, the first in its lower half: (ceil(depth / 2), 64).
struct Int4Panel {
  int64_t depth = 0;  // inputs
  int64_t group = 0;  // inputs a scale; the last group may be shorter

  int64_t groups() const { return (depth + group - 1) / group; }
  int64_t bytes() const { return kPanelWidth * (2 * groups() + (depth + 1) / 2); }
  // Output `lane` of a zeroed panel from its weights (depth).
  void narrow(const float* weights, int64_t lane, std::byte* panel) const;
  // The fp32 panel, (depth, 64).
  void widen(const std::byte* panel, float* out) const;
  // One output of it, (depth).
  void widen_column(const std::byte* panel, int64_t lane, float* out) const;
};

}  // namespace vqkv
