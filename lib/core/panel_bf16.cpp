#include <immintrin.h>

#include <cstring>

#include "core/panel.h"

namespace vqkv {
namespace {

constexpr int64_t kLanes = 16;
constexpr int kVectors = 4;
constexpr int64_t kRows = 6;  // 6 rows x 4 vectors: 24 of 32 registers hold sums, as in core/panel.cpp

inline __m512bh pairs_of(const bf16* p) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p)); }
inline __m512bh broadcast_pair(const bf16* p) {
  int32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  return reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
}

// Each instruction adds two exact products to an fp32 sum.
template <int Rows>
void tile(const bf16* w, int64_t pairs, const bf16* x, int64_t x_stride, float* y, int64_t y_stride, bool from_zero,
          bool add) {
  __m512 sum[Rows][kVectors];
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < kVectors; ++v)
      sum[r][v] = from_zero ? _mm512_setzero_ps() : _mm512_loadu_ps(y + r * y_stride + v * kLanes);
  for (int64_t k = 0; k < pairs; ++k, w += 2 * kPanelWidth) {
    __m512bh b[kVectors];
    for (int v = 0; v < kVectors; ++v) b[v] = pairs_of(w + 2 * v * kLanes);
    for (int r = 0; r < Rows; ++r) {
      const __m512bh a = broadcast_pair(x + r * x_stride + 2 * k);
      for (int v = 0; v < kVectors; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], a, b[v]);
    }
  }
  if (add)
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < kVectors; ++v)
        sum[r][v] = _mm512_add_ps(sum[r][v], _mm512_loadu_ps(y + r * y_stride + v * kLanes));
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(y + r * y_stride + v * kLanes, sum[r][v]);
}

}  // namespace

void multiply_panel_bf16(const bf16* panel, int64_t pairs, const bf16* x, int64_t x_stride, int64_t rows, float* y,
                         int64_t y_stride, bool add) {
  constexpr int64_t kMost = kPanelBytes / (2 * kPanelWidth * static_cast<int64_t>(sizeof(bf16)));
  const int64_t pieces = (pairs + kMost - 1) / kMost, piece = (pairs + pieces - 1) / pieces;
  for (int64_t first = 0; first < pairs; first += piece) {
    const int64_t depth = pairs - first < piece ? pairs - first : piece;
    const bf16* w = panel + first * 2 * kPanelWidth;
    for (int64_t r = 0; r < rows; r += kRows) {
      const bf16* from = x + r * x_stride + 2 * first;
      float* out = y + r * y_stride;
      switch (rows - r) {
        case 1:
          tile<1>(w, depth, from, x_stride, out, y_stride, first == 0, add);
          break;
        case 2:
          tile<2>(w, depth, from, x_stride, out, y_stride, first == 0, add);
          break;
        case 3:
          tile<3>(w, depth, from, x_stride, out, y_stride, first == 0, add);
          break;
        case 4:
          tile<4>(w, depth, from, x_stride, out, y_stride, first == 0, add);
          break;
        case 5:
          tile<5>(w, depth, from, x_stride, out, y_stride, first == 0, add);
          break;
        default:
          tile<6>(w, depth, from, x_stride, out, y_stride, first == 0, add);
          break;
      }
    }
  }
}

}  // namespace vqkv
