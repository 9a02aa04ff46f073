#include "attention/kernels.h"

#include <algorithm>
#include <limits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "attention/kernels.cpp"
#include <hwy/foreach_target.h>  // compiles this file once per target
#include <hwy/highway.h>
#include <hwy/contrib/math/math-inl.h>

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
HWY_INLINE void multiply_rows(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t k,
                              int64_t n, bool accumulate) {
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
    case 5: multiply_rows<5>(a, lda, b, ldb, c, ldc, k, n, accumulate); break;
    case 4: multiply_rows<4>(a, lda, b, ldb, c, ldc, k, n, accumulate); break;
    case 3: multiply_rows<3>(a, lda, b, ldb, c, ldc, k, n, accumulate); break;
    case 2: multiply_rows<2>(a, lda, b, ldb, c, ldc, k, n, accumulate); break;
    case 1: multiply_rows<1>(a, lda, b, ldb, c, ldc, k, n, accumulate); break;
    default: break;
  }
}

float RowMax(const float* s, int64_t n) {
  const D d;
  V top = hn::Set(d, -std::numeric_limits<float>::infinity());
  for (int64_t i = 0; i < n; i += static_cast<int64_t>(hn::Lanes(d))) top = hn::Max(top, hn::LoadU(d, s + i));
  return hn::GetLane(hn::MaxOfLanes(d, top));
}

float ExpRow(float* s, int64_t n, float top) {
  const D d;
  const V shift = hn::Set(d, top);
  V sum = hn::Zero(d);
  for (int64_t i = 0; i < n; i += static_cast<int64_t>(hn::Lanes(d))) {
    const V p = hn::Exp(d, hn::Sub(hn::LoadU(d, s + i), shift));
    hn::StoreU(p, d, s + i);
    sum = hn::Add(sum, p);
  }
  return hn::GetLane(hn::SumOfLanes(d, sum));
}

float RangeSum(const float* s, int64_t first, int64_t last) {
  const D d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  V sum = hn::Zero(d);
  int64_t i = first;
  for (; i + lanes <= last; i += lanes) sum = hn::Add(sum, hn::LoadU(d, s + i));
  float total = hn::GetLane(hn::SumOfLanes(d, sum));
  for (; i < last; ++i) total += s[i];
  return total;
}

void ScaleRow(float* x, int64_t n, float f) {
  const D d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) hn::StoreU(hn::Mul(hn::LoadU(d, x + i), hn::Set(d, f)), d, x + i);
  for (; i < n; ++i) x[i] *= f;
}

void AddScaled(const float* x, int64_t n, float f, float* y) {
  const D d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes)
    hn::StoreU(hn::MulAdd(hn::LoadU(d, x + i), hn::Set(d, f), hn::LoadU(d, y + i)), d, y + i);
  for (; i < n; ++i) y[i] += f * x[i];
}

}  // namespace HWY_NAMESPACE
}  // namespace vqkv::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace vqkv::kernels {

HWY_EXPORT(Multiply);
HWY_EXPORT(RowMax);
HWY_EXPORT(ExpRow);
HWY_EXPORT(RangeSum);
HWY_EXPORT(ScaleRow);
HWY_EXPORT(AddScaled);

void multiply(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t m, int64_t k,
              int64_t n, bool accumulate) {
  HWY_DYNAMIC_DISPATCH(Multiply)(a, lda, b, ldb, c, ldc, m, k, n, accumulate);
}
float row_max(const float* s, int64_t n) { return HWY_DYNAMIC_DISPATCH(RowMax)(s, n); }
float exp_row(float* s, int64_t n, float top) { return HWY_DYNAMIC_DISPATCH(ExpRow)(s, n, top); }
float range_sum(const float* s, int64_t first, int64_t last) { return HWY_DYNAMIC_DISPATCH(RangeSum)(s, first, last); }
void scale_row(float* x, int64_t n, float f) { HWY_DYNAMIC_DISPATCH(ScaleRow)(x, n, f); }
void add_scaled(const float* x, int64_t n, float f, float* y) { HWY_DYNAMIC_DISPATCH(AddScaled)(x, n, f, y); }

}  // namespace vqkv::kernels
#endif
