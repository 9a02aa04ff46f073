#include "cache/kernels.h"

#include <algorithm>
#include <limits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cache/kernels.cpp"
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

template <class Tag>
HWY_INLINE void lookup_fixed(Tag tag, const float* words, int64_t word_stride, const uint16_t* codes, int64_t count,
                             int64_t width, float* rows, int64_t row_stride, bool add) {
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(tag));
  for (int64_t t = 0; t < count; ++t) {
    const float* word = words + int64_t{codes[t]} * word_stride;
    float* row = rows + t * row_stride;
    if (add)
      for (int64_t i = 0; i < width; i += lanes)
        hn::StoreU(hn::Add(hn::LoadU(tag, row + i), hn::LoadU(tag, word + i)), tag, row + i);
    else
      for (int64_t i = 0; i < width; i += lanes) hn::StoreU(hn::LoadU(tag, word + i), tag, row + i);
  }
}

void LookupRows(const float* words, int64_t word_stride, const uint16_t* codes, int64_t count, int64_t width,
                float* rows, int64_t row_stride, bool add) {
  const D d;
  const hn::CappedTag<float, 8> d8;
  const hn::CappedTag<float, 4> d4;
  if (width % static_cast<int64_t>(hn::Lanes(d)) == 0) {
    lookup_fixed(d, words, word_stride, codes, count, width, rows, row_stride, add);
  } else if (width % static_cast<int64_t>(hn::Lanes(d8)) == 0) {
    lookup_fixed(d8, words, word_stride, codes, count, width, rows, row_stride, add);
  } else if (width % static_cast<int64_t>(hn::Lanes(d4)) == 0) {
    lookup_fixed(d4, words, word_stride, codes, count, width, rows, row_stride, add);
  } else {
    for (int64_t t = 0; t < count; ++t)
      for (int64_t i = 0; i < width; ++i) {
        const float w = words[int64_t{codes[t]} * word_stride + i];
        rows[t * row_stride + i] = add ? rows[t * row_stride + i] + w : w;
      }
  }
}

void DecodeLevels(const uint16_t* codes, int64_t count, const float* levels, float offset, const float* scale,
                  const float* zero, float* out, bool add) {
  const D d;
  const hn::Rebind<uint16_t, D> d16;
  const hn::RebindToSigned<D> di;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t t = 0;
  for (; t + lanes <= count; t += lanes) {
    const auto code = hn::PromoteTo(di, hn::LoadU(d16, codes + t));
    V v = levels ? hn::GatherIndex(d, levels, code) : hn::Sub(hn::ConvertTo(d, code), hn::Set(d, offset));
    if (scale && zero)
      v = hn::MulAdd(hn::LoadU(d, scale + t), v, hn::LoadU(d, zero + t));
    else if (scale)
      v = hn::Mul(hn::LoadU(d, scale + t), v);
    else if (zero)
      v = hn::Add(v, hn::LoadU(d, zero + t));
    hn::StoreU(add ? hn::Add(v, hn::LoadU(d, out + t)) : v, d, out + t);
  }
  for (; t < count; ++t) {
    // One lane at a time by the same operations, so that a value does not depend on where its tile was cut.
    const hn::CappedTag<float, 1> d1;
    const float level = levels ? levels[codes[t]] : static_cast<float>(codes[t]) - offset;
    auto v = hn::Set(d1, level);
    if (scale && zero)
      v = hn::MulAdd(hn::Set(d1, scale[t]), v, hn::Set(d1, zero[t]));
    else if (scale)
      v = hn::Mul(hn::Set(d1, scale[t]), v);
    else if (zero)
      v = hn::Add(v, hn::Set(d1, zero[t]));
    out[t] = add ? out[t] + hn::GetLane(v) : hn::GetLane(v);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace vqkv::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include <immintrin.h>

#include "core/cpu.h"

namespace vqkv::kernels {

HWY_EXPORT(Multiply);
HWY_EXPORT(RowMax);
HWY_EXPORT(ExpRow);
HWY_EXPORT(RangeSum);
HWY_EXPORT(ScaleRow);
HWY_EXPORT(AddScaled);
HWY_EXPORT(LookupRows);
HWY_EXPORT(DecodeLevels);

void multiply(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t m, int64_t k,
              int64_t n, bool accumulate) {
  HWY_DYNAMIC_DISPATCH(Multiply)(a, lda, b, ldb, c, ldc, m, k, n, accumulate);
}
float row_max(const float* s, int64_t n) { return HWY_DYNAMIC_DISPATCH(RowMax)(s, n); }
float exp_row(float* s, int64_t n, float top) { return HWY_DYNAMIC_DISPATCH(ExpRow)(s, n, top); }
float range_sum(const float* s, int64_t first, int64_t last) { return HWY_DYNAMIC_DISPATCH(RangeSum)(s, first, last); }
void scale_row(float* x, int64_t n, float f) { HWY_DYNAMIC_DISPATCH(ScaleRow)(x, n, f); }
void add_scaled(const float* x, int64_t n, float f, float* y) { HWY_DYNAMIC_DISPATCH(AddScaled)(x, n, f, y); }
void lookup_rows(const float* words, int64_t word_stride, const uint16_t* codes, int64_t count, int64_t width,
                 float* rows, int64_t row_stride, bool add) {
  HWY_DYNAMIC_DISPATCH(LookupRows)(words, word_stride, codes, count, width, rows, row_stride, add);
}
void decode_levels(const uint16_t* codes, int64_t count, const float* levels, float offset, const float* scale,
                   const float* zero, float* out, bool add) {
  HWY_DYNAMIC_DISPATCH(DecodeLevels)(codes, count, levels, offset, scale, zero, out, add);
}

namespace {

// One 8 x 8 block in registers; `add` sums into what is there.
__attribute__((target("avx2"))) void transpose_8x8(const float* in, int64_t in_stride, float* out, int64_t out_stride,
                                                   bool add) {
  __m256 r[8], s[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(in + i * in_stride);
  for (int i = 0; i < 8; i += 2) {
    s[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    s[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(s[i], s[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(s[i], s[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    s[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
    s[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
  }
  for (int i = 0; i < 8; ++i) {
    float* to = out + i * out_stride;
    _mm256_storeu_ps(to, add ? _mm256_add_ps(_mm256_loadu_ps(to), s[i]) : s[i]);
  }
}

}  // namespace

void transpose(const float* in, int64_t in_stride, int64_t rows, int64_t columns, float* out, int64_t out_stride,
               bool add) {
  const bool fast = cpu_features().avx2;
  for (int64_t r = 0; r < rows; r += 8) {
    for (int64_t c = 0; c < columns; c += 8) {
      if (fast && r + 8 <= rows && c + 8 <= columns) {
        transpose_8x8(in + r * in_stride + c, in_stride, out + c * out_stride + r, out_stride, add);
        continue;
      }
      if (!add && c + 4 <= columns && columns < 8 && r + 8 <= rows) {  // narrow codebooks
        for (int64_t i = r; i < r + 8; i += 4) {
          __m128 v[4];
          for (int j = 0; j < 4; ++j) v[j] = _mm_loadu_ps(in + (i + j) * in_stride + c);
          _MM_TRANSPOSE4_PS(v[0], v[1], v[2], v[3]);
          for (int j = 0; j < 4; ++j) _mm_storeu_ps(out + (c + j) * out_stride + i, v[j]);
        }
        for (int64_t i = r; i < r + 8; ++i)
          for (int64_t j = c + 4; j < columns; ++j) out[j * out_stride + i] = in[i * in_stride + j];
        continue;
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
