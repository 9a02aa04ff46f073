#include "core/panel.h"

#include <algorithm>
#include <type_traits>

#include "core/cpu.h"

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

// Equal pieces of a panel, in even numbers of rows.
constexpr int64_t piece_of(int64_t depth, size_t element) {
  const int64_t most = kPanelBytes / (kPanelWidth * static_cast<int64_t>(element));
  const int64_t pieces = (depth + most - 1) / most;
  return ((depth + pieces - 1) / pieces + 1) / 2 * 2;
}

// Rows of a panel that lie side by side, and the one of them that a load takes.
template <class T>
constexpr int64_t kTogether = std::is_same_v<T, bf16> ? 2 : 1;

template <int Which>
HWY_INLINE V load(const float* p) {
  return hn::LoadU(D(), p);
}
template <int Which>
HWY_INLINE V load(const bf16* p) {
  const hn::RebindToUnsigned<D> words;
  const auto pair = hn::LoadU(words, reinterpret_cast<const uint32_t*>(p));
  return hn::BitCast(D(), Which == 0 ? hn::ShiftLeft<16>(pair) : hn::And(pair, hn::Set(words, 0xffff0000u)));
}

template <int Which, int Rows, int Vectors, class T>
HWY_INLINE void add_step(const T* w, const float* x, int64_t x_stride, V (&sum)[Rows][Vectors]) {
  V b[Vectors];
  for (int v = 0; v < Vectors; ++v) b[v] = load<Which>(w + v * kLanes * kTogether<T>);
  for (int r = 0; r < Rows; ++r) {
    const V a = hn::Set(D(), x[r * x_stride]);
    for (int v = 0; v < Vectors; ++v) sum[r][v] = hn::MulAdd(a, b[v], sum[r][v]);
  }
}

// Rows x (Vectors * lanes) outputs in registers.
template <int Rows, int Vectors, class T>
HWY_INLINE void tile(const T* HWY_RESTRICT w, int64_t depth, const float* HWY_RESTRICT x, int64_t x_stride,
                     float* HWY_RESTRICT y, int64_t y_stride, bool from_zero, bool add) {
  const D d;
  V sum[Rows][Vectors];
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v) sum[r][v] = from_zero ? hn::Zero(d) : hn::LoadU(d, y + r * y_stride + v * kLanes);
  int64_t k = 0;
  for (; k + kTogether<T> <= depth; k += kTogether<T>, w += kTogether<T> * kPanelWidth) {
    add_step<0>(w, x + k, x_stride, sum);
    if constexpr (kTogether<T> == 2) add_step<1>(w, x + k + 1, x_stride, sum);
  }
  if (k < depth) add_step<0>(w, x + k, x_stride, sum);
  if (add)
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < Vectors; ++v) sum[r][v] = hn::Add(sum[r][v], hn::LoadU(d, y + r * y_stride + v * kLanes));
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v) hn::StoreU(sum[r][v], d, y + r * y_stride + v * kLanes);
}

// AVX-512: 6 rows x 4 vectors use 24 of 32 registers for sums. With 16 registers 6 x 2 is what fits. A single row
// (decode) takes as many columns at once as possible, so that the panel streams through once.
template <int Rows, class T>
void rows_of_panel(const T* w, int64_t depth, const float* x, int64_t x_stride, float* y, int64_t y_stride,
                   bool from_zero, bool add) {
  constexpr int kWhole = static_cast<int>(kPanelWidth / kLanes);
  constexpr int kVectors = std::min(kWhole, kLanes >= 16 ? 4 : Rows == 1 ? 8 : 2);
  for (int64_t c = 0; c < kPanelWidth; c += kVectors * kLanes)
    tile<Rows, kVectors>(w + c * kTogether<T>, depth, x, x_stride, y + c, y_stride, from_zero, add);
}

template <class T>
void multiply(const PanelProduct& p, float* y, int64_t y_stride, bool add) {
  constexpr int64_t kRows = 6;
  const int64_t piece = piece_of(p.depth, sizeof(T));
  for (int64_t first = 0; first < p.depth; first += piece) {
    const int64_t depth = std::min(piece, p.depth - first);
    const T* w = static_cast<const T*>(p.panel) + first * kPanelWidth;
    for (int64_t r = 0; r < p.rows; r += kRows) {
      const float* x = p.x + r * p.x_stride + first;
      float* out = y + r * y_stride;
      switch (std::min(kRows, p.rows - r)) {
        case 1:
          rows_of_panel<1>(w, depth, x, p.x_stride, out, y_stride, first == 0, add);
          break;
        case 2:
          rows_of_panel<2>(w, depth, x, p.x_stride, out, y_stride, first == 0, add);
          break;
        case 3:
          rows_of_panel<3>(w, depth, x, p.x_stride, out, y_stride, first == 0, add);
          break;
        case 4:
          rows_of_panel<4>(w, depth, x, p.x_stride, out, y_stride, first == 0, add);
          break;
        case 5:
          rows_of_panel<5>(w, depth, x, p.x_stride, out, y_stride, first == 0, add);
          break;
        default:
          rows_of_panel<6>(w, depth, x, p.x_stride, out, y_stride, first == 0, add);
          break;
      }
    }
  }
}

void multiply_any(const PanelProduct& p) {
  const auto run = [&](float* y, int64_t stride, bool add) {
    if constexpr (kX86Units)
      if (p.x_rounded)
        return multiply_panel_bf16(static_cast<const bf16*>(p.panel), (p.depth + 1) / 2, p.x_rounded, p.x_stride,
                                   p.rows, y, stride, add);
    if (p.type == DType::kF32)
      multiply<float>(p, y, stride, add);
    else
      multiply<bf16>(p, y, stride, add);
  };
  const bool one_piece = piece_of(p.depth, dtype_size(p.type)) >= p.depth;
  if (p.cols == kPanelWidth && (!p.accumulate || one_piece)) return run(p.y, p.y_stride, p.accumulate);
  // The last panel may be narrower than 64: whole vectors go through a buffer. So does y += x W in pieces: one rounding
  // of a large residual stream instead of one a piece.
  AlignedVector<float> sums(static_cast<size_t>(p.rows * kPanelWidth));
  run(sums.data(), kPanelWidth, false);
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
