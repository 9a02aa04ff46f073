#include "core/panel.h"

#include <algorithm>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "core/panel.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace vqkv {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using D = hn::ScalableTag<float>;
using V = hn::Vec<D>;
constexpr int64_t kLanes = static_cast<int64_t>(hn::MaxLanes(D()));

HWY_INLINE V load(const float* p) { return hn::LoadU(D(), p); }
HWY_INLINE V load(const bf16* p) {
  const hn::Rebind<hwy::bfloat16_t, D> narrow;
  return hn::PromoteTo(D(), hn::LoadU(narrow, reinterpret_cast<const hwy::bfloat16_t*>(p)));
}

// Rows x (Vectors * lanes) outputs in registers.
template <int Rows, int Vectors, class T>
HWY_INLINE void tile(const T* HWY_RESTRICT w, int64_t depth, const float* HWY_RESTRICT x, int64_t x_stride,
                     float* HWY_RESTRICT y, int64_t y_stride, bool from_zero) {
  const D d;
  V sum[Rows][Vectors];
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v) sum[r][v] = from_zero ? hn::Zero(d) : hn::LoadU(d, y + r * y_stride + v * kLanes);
  for (int64_t k = 0; k < depth; ++k, w += kPanelWidth) {
    V b[Vectors];
    for (int v = 0; v < Vectors; ++v) b[v] = load(w + v * kLanes);
    for (int r = 0; r < Rows; ++r) {
      const V a = hn::Set(d, x[r * x_stride + k]);
      for (int v = 0; v < Vectors; ++v) sum[r][v] = hn::MulAdd(a, b[v], sum[r][v]);
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v) hn::StoreU(sum[r][v], d, y + r * y_stride + v * kLanes);
}

// AVX-512: 6 rows x 4 vectors use 24 of 32 registers for sums. With 16 registers 6 x 2 is what fits. A single row
// (decode) takes as many columns at once as possible, so that the panel streams through once.
template <int Rows, class T>
void rows_of_panel(const T* w, int64_t depth, const float* x, int64_t x_stride, float* y, int64_t y_stride,
                   bool from_zero) {
  constexpr int kWhole = static_cast<int>(kPanelWidth / kLanes);
  constexpr int kVectors = std::min(kWhole, kLanes >= 16 ? 4 : Rows == 1 ? 8 : 2);
  for (int64_t c = 0; c < kPanelWidth; c += kVectors * kLanes)
    tile<Rows, kVectors>(w + c, depth, x, x_stride, y + c, y_stride, from_zero);
}

template <class T>
void multiply(const PanelProduct& p, float* y, int64_t y_stride) {
  // 512 rows of a panel are 128 KiB: they stay in the second-level cache while all rows of x pass. Sums wait in y.
  constexpr int64_t kDepth = 512;
  constexpr int64_t kRows = 6;
  for (int64_t first = 0; first < p.depth; first += kDepth) {
    const int64_t depth = std::min(kDepth, p.depth - first);
    const T* w = static_cast<const T*>(p.panel) + first * kPanelWidth;
    const bool from_zero = first == 0;
    for (int64_t r = 0; r < p.rows; r += kRows) {
      const float* x = p.x + r * p.x_stride + first;
      float* out = y + r * y_stride;
      switch (std::min(kRows, p.rows - r)) {
        case 1:
          rows_of_panel<1>(w, depth, x, p.x_stride, out, y_stride, from_zero);
          break;
        case 2:
          rows_of_panel<2>(w, depth, x, p.x_stride, out, y_stride, from_zero);
          break;
        case 3:
          rows_of_panel<3>(w, depth, x, p.x_stride, out, y_stride, from_zero);
          break;
        case 4:
          rows_of_panel<4>(w, depth, x, p.x_stride, out, y_stride, from_zero);
          break;
        case 5:
          rows_of_panel<5>(w, depth, x, p.x_stride, out, y_stride, from_zero);
          break;
        default:
          rows_of_panel<6>(w, depth, x, p.x_stride, out, y_stride, from_zero);
          break;
      }
    }
  }
}

void multiply_any(const PanelProduct& p) {
  const auto run = [&](float* y, int64_t stride) {
    if (p.type == DType::kF32)
      multiply<float>(p, y, stride);
    else
      multiply<bf16>(p, y, stride);
  };
  if (p.cols == kPanelWidth && !p.accumulate) return run(p.y, p.y_stride);
  // The last panel may be narrower than 64: whole vectors go through a buffer. So does y += x W: one rounding of a
  // large residual stream instead of one a product.
  AlignedVector<float> sums(static_cast<size_t>(p.rows * kPanelWidth));
  run(sums.data(), kPanelWidth);
  for (int64_t r = 0; r < p.rows; ++r) {
    const float* from = sums.data() + r * kPanelWidth;
    float* to = p.y + r * p.y_stride;
    for (int64_t c = 0; c < p.cols; ++c) to[c] = p.accumulate ? to[c] + from[c] : from[c];
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace vqkv
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace vqkv {
HWY_EXPORT(multiply_any);
void multiply_panel(const PanelProduct& p) { HWY_DYNAMIC_DISPATCH(multiply_any)(p); }
}  // namespace vqkv
#endif
