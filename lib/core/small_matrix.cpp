#include "core/small_matrix.h"

#include <algorithm>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "core/small_matrix.cpp"
#include <hwy/foreach_target.h>  // compiles this file once per target
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace vqkv::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using D = hn::CappedTag<float, 16>;
using V = hn::Vec<D>;

// Rows x vectors of accumulators held in registers: 24 of the 32 registers of AVX-512, 12 of the 16 of AVX2.
#if HWY_TARGET <= HWY_AVX3
constexpr int kVectors = 4;
#else
constexpr int kVectors = 2;
#endif
constexpr int kRows = 6;

template <int R, int C>
HWY_INLINE void multiply_block(const float* HWY_RESTRICT a, int64_t lda, const float* HWY_RESTRICT b, int64_t ldb,
                               float* HWY_RESTRICT c, int64_t ldc, int64_t k, bool accumulate) {
  const D d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  V sum[R][C];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < C; ++j) sum[r][j] = accumulate ? hn::LoadU(d, c + r * ldc + j * lanes) : hn::Zero(d);
  for (int64_t i = 0; i < k; ++i) {
    V row[C];
    for (int j = 0; j < C; ++j) row[j] = hn::LoadU(d, b + i * ldb + j * lanes);
    for (int r = 0; r < R; ++r) {
      const V x = hn::Set(d, a[r * lda + i]);
      for (int j = 0; j < C; ++j) sum[r][j] = hn::MulAdd(x, row[j], sum[r][j]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < C; ++j) hn::StoreU(sum[r][j], d, c + r * ldc + j * lanes);
}

template <int R>
HWY_INLINE void multiply_rows(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
                              int64_t k, int64_t n, bool accumulate) {
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(D()));
  int64_t j = 0;
  for (; j + kVectors * lanes <= n; j += kVectors * lanes)
    multiply_block<R, kVectors>(a, lda, b + j, ldb, c + j, ldc, k, accumulate);
  for (; j + 2 * lanes <= n; j += 2 * lanes) multiply_block<R, 2>(a, lda, b + j, ldb, c + j, ldc, k, accumulate);
  for (; j < n; j += lanes) multiply_block<R, 1>(a, lda, b + j, ldb, c + j, ldc, k, accumulate);
}

void Multiply(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t m, int64_t k,
              int64_t n, bool accumulate) {
  int64_t r = 0;
  for (; r + kRows <= m; r += kRows) multiply_rows<kRows>(a + r * lda, lda, b, ldb, c + r * ldc, ldc, k, n, accumulate);
  a += r * lda;
  c += r * ldc;
  switch (m - r) {
    case 5:
      multiply_rows<5>(a, lda, b, ldb, c, ldc, k, n, accumulate);
      break;
    case 4:
      multiply_rows<4>(a, lda, b, ldb, c, ldc, k, n, accumulate);
      break;
    case 3:
      multiply_rows<3>(a, lda, b, ldb, c, ldc, k, n, accumulate);
      break;
    case 2:
      multiply_rows<2>(a, lda, b, ldb, c, ldc, k, n, accumulate);
      break;
    case 1:
      multiply_rows<1>(a, lda, b, ldb, c, ldc, k, n, accumulate);
      break;
    default:
      break;
  }
}

void ScaleRow(float* x, int64_t n, float f) {
  const D d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) hn::StoreU(hn::Mul(hn::LoadU(d, x + i), hn::Set(d, f)), d, x + i);
  for (; i < n; ++i) x[i] *= f;
}

}  // namespace HWY_NAMESPACE
}  // namespace vqkv::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include "core/cpu.h"
#include "core/small_matrix_avx2.h"

namespace vqkv::kernels {

HWY_EXPORT(Multiply);
HWY_EXPORT(ScaleRow);

void multiply(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t m, int64_t k,
              int64_t n, bool accumulate) {
  HWY_DYNAMIC_DISPATCH(Multiply)(a, lda, b, ldb, c, ldc, m, k, n, accumulate);
}
void scale_row(float* x, int64_t n, float f) { HWY_DYNAMIC_DISPATCH(ScaleRow)(x, n, f); }

void transpose(const float* in, int64_t in_stride, int64_t rows, int64_t columns, float* out, int64_t out_stride,
               bool add) {
  [[maybe_unused]] const bool fast = cpu_features().avx2;
  for (int64_t r = 0; r < rows; r += 8) {
    for (int64_t c = 0; c < columns; c += 8) {
      if constexpr (kX86Units) {
        if (fast && r + 8 <= rows && c + 8 <= columns) {
          transpose_8x8_avx2(in + r * in_stride + c, in_stride, out + c * out_stride + r, out_stride, add);
          continue;
        }
        if (fast && !add && c + 4 <= columns && columns < 8 && r + 8 <= rows) {  // narrow codebooks
          transpose_8x4_avx2(in + r * in_stride + c, in_stride, out + c * out_stride + r, out_stride);
          for (int64_t i = r; i < r + 8; ++i)
            for (int64_t j = c + 4; j < columns; ++j) out[j * out_stride + i] = in[i * in_stride + j];
          continue;
        }
      }
      for (int64_t i = r; i < std::min(rows, r + 8); ++i)
        for (int64_t j = c; j < std::min(columns, c + 8); ++j) {
          float& to = out[j * out_stride + i];
          to = add ? to + in[i * in_stride + j] : in[i * in_stride + j];
        }
    }
  }
}

}  // namespace vqkv::kernels
#endif
