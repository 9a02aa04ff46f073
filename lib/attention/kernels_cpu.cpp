#include "attention/kernels_cpu.h"

#include <algorithm>
#include <limits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "attention/kernels_cpu.cpp"
#include <hwy/foreach_target.h>  // compiles this file once per target
#include <hwy/highway.h>

#include <hwy/contrib/math/math-inl.h>

HWY_BEFORE_NAMESPACE();
namespace vqkv::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using D = hn::CappedTag<float, 16>;
using V = hn::Vec<D>;

template <class Tag, int R>
HWY_INLINE void multiply_transposed_block(Tag d, const float* HWY_RESTRICT a, int64_t lda, const float* HWY_RESTRICT b,
                                          int64_t ldb, float* HWY_RESTRICT c, int64_t ldc, int64_t k) {
  hn::Vec<Tag> even[R], odd[R];
  for (int r = 0; r < R; ++r) even[r] = odd[r] = hn::Zero(d);
  int64_t i = 0;
  for (; i + 2 <= k; i += 2) {
    const auto x = hn::LoadU(d, b + i * ldb), y = hn::LoadU(d, b + (i + 1) * ldb);
    for (int r = 0; r < R; ++r) {
      even[r] = hn::MulAdd(hn::Set(d, a[i * lda + r]), x, even[r]);
      odd[r] = hn::MulAdd(hn::Set(d, a[(i + 1) * lda + r]), y, odd[r]);
    }
  }
  if (i < k)
    for (int r = 0; r < R; ++r) even[r] = hn::MulAdd(hn::Set(d, a[i * lda + r]), hn::LoadU(d, b + i * ldb), even[r]);
  for (int r = 0; r < R; ++r) hn::StoreU(hn::Add(hn::LoadU(d, c + r * ldc), hn::Add(even[r], odd[r])), d, c + r * ldc);
}

template <class Tag>
HWY_INLINE void multiply_transposed_columns(Tag d, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                                            int64_t ldc, int64_t m, int64_t k) {
  for (; m >= 4; m -= 4, a += 4, c += 4 * ldc) multiply_transposed_block<Tag, 4>(d, a, lda, b, ldb, c, ldc, k);
  for (; m >= 2; m -= 2, a += 2, c += 2 * ldc) multiply_transposed_block<Tag, 2>(d, a, lda, b, ldb, c, ldc, k);
  for (; m > 0; --m, ++a, c += ldc) multiply_transposed_block<Tag, 1>(d, a, lda, b, ldb, c, ldc, k);
}

void MultiplyTransposed(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t m,
                        int64_t k, int64_t n) {
  const D d;
  const hn::CappedTag<float, 4> d4;
  const hn::CappedTag<float, 1> d1;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d)), few = static_cast<int64_t>(hn::Lanes(d4));
  int64_t j = 0;
  for (; j + lanes <= n; j += lanes) multiply_transposed_columns(d, a, lda, b + j, ldb, c + j, ldc, m, k);
#if HWY_TARGET <= HWY_AVX3
  const hn::CappedTag<float, 8> d8;
  for (; j + 8 <= n; j += 8) multiply_transposed_columns(d8, a, lda, b + j, ldb, c + j, ldc, m, k);
#endif
  for (; j + few <= n; j += few) multiply_transposed_columns(d4, a, lda, b + j, ldb, c + j, ldc, m, k);
  const hn::CappedTag<float, 2> d2;
  for (; j + 2 <= n; j += 2) multiply_transposed_columns(d2, a, lda, b + j, ldb, c + j, ldc, m, k);
  for (; j < n; ++j) multiply_transposed_columns(d1, a, lda, b + j, ldb, c + j, ldc, m, k);
}

// S slots at once: a sum that meets its own code again waits for its last store, the others go on meanwhile.
template <int L, int S>
HWY_INLINE void add_slots(const float* HWY_RESTRICT weights, const uint16_t* HWY_RESTRICT codes, int64_t code_stride,
                          int64_t count, float* sums, int64_t sums_stride) {
  const hn::CappedTag<float, L> d;
  constexpr int64_t kStep = static_cast<int64_t>(hn::MaxLanes(hn::CappedTag<float, L>()));
  for (int64_t t = 0; t < count; ++t) {
    for (int64_t i = 0; i < L; i += kStep) {
      const auto w = hn::LoadU(d, weights + t * L + i);
      for (int s = 0; s < S; ++s) {
        float* at = sums + s * sums_stride + size_t{codes[s * code_stride + t]} * L + i;
        hn::StoreU(hn::Add(hn::LoadU(d, at), w), d, at);
      }
    }
  }
}

template <int L>
HWY_INLINE void add_lanes(const float* weights, const uint16_t* codes, int64_t code_stride, int64_t slots,
                          int64_t count, float* sums, int64_t sums_stride) {
  int64_t s = 0;
  for (; s + 4 <= slots; s += 4)
    add_slots<L, 4>(weights, codes + s * code_stride, code_stride, count, sums + s * sums_stride, sums_stride);
  for (; s < slots; ++s)
    add_slots<L, 1>(weights, codes + s * code_stride, code_stride, count, sums + s * sums_stride, sums_stride);
}

void AddByCode(const float* weights, int64_t lanes, const uint16_t* codes, int64_t code_stride, int64_t slots,
               int64_t count, float* sums, int64_t sums_stride) {
  if (lanes == 1)
    add_lanes<1>(weights, codes, code_stride, slots, count, sums, sums_stride);
  else if (lanes == 4)
    add_lanes<4>(weights, codes, code_stride, slots, count, sums, sums_stride);
  else if (lanes == 8)
    add_lanes<8>(weights, codes, code_stride, slots, count, sums, sums_stride);
  else
    add_lanes<16>(weights, codes, code_stride, slots, count, sums, sums_stride);
}

template <int L, int S>
HWY_INLINE void sum_slots(const float* HWY_RESTRICT words, int64_t words_stride, const uint16_t* HWY_RESTRICT codes,
                          int64_t code_stride, int64_t count, float* HWY_RESTRICT out, bool add) {
  const hn::CappedTag<float, L> d;
  constexpr int64_t kStep = static_cast<int64_t>(hn::MaxLanes(hn::CappedTag<float, L>()));
  for (int64_t t = 0; t < count; ++t) {
    for (int64_t i = 0; i < L; i += kStep) {
      auto sum = add ? hn::LoadU(d, out + t * L + i) : hn::Zero(d);
      for (int s = 0; s < S; ++s)
        sum = hn::Add(sum, hn::LoadU(d, words + s * words_stride + size_t{codes[s * code_stride + t]} * L + i));
      hn::StoreU(sum, d, out + t * L + i);
    }
  }
}

template <int L>
HWY_INLINE void sum_lanes(const float* words, int64_t words_stride, const uint16_t* codes, int64_t code_stride,
                          int64_t slots, int64_t count, float* out) {
  int64_t s = 0;
  for (; s + 4 <= slots; s += 4)
    sum_slots<L, 4>(words + s * words_stride, words_stride, codes + s * code_stride, code_stride, count, out, s > 0);
  for (; s < slots; ++s)
    sum_slots<L, 1>(words + s * words_stride, words_stride, codes + s * code_stride, code_stride, count, out, s > 0);
}

void SumByCode(const float* words, int64_t words_stride, int64_t lanes, const uint16_t* codes, int64_t code_stride,
               int64_t slots, int64_t count, float* out) {
  if (lanes == 1)
    sum_lanes<1>(words, words_stride, codes, code_stride, slots, count, out);
  else if (lanes == 4)
    sum_lanes<4>(words, words_stride, codes, code_stride, slots, count, out);
  else if (lanes == 8)
    sum_lanes<8>(words, words_stride, codes, code_stride, slots, count, out);
  else
    sum_lanes<16>(words, words_stride, codes, code_stride, slots, count, out);
}

// R rows against 4 tokens: 4 R chains, whose lanes are added up as a tree over neighbours at the end, whatever R is.
template <int R>
HWY_INLINE void score_pair_rows(const float* HWY_RESTRICT keys, const float* HWY_RESTRICT phases, int64_t phase_stride,
                                int64_t half, const float* HWY_RESTRICT q, int64_t blocks, int64_t count, float* out,
                                int64_t out_stride) {
  constexpr int kTokens = 4, kRows = 4;
  const D d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d)), row = 32 * blocks;
  for (int64_t t = 0; t < count; t += kTokens) {
    V sum[kRows * kTokens];
    for (V& v : sum) v = hn::Zero(d);
    const float *k[kTokens], *phase[kTokens];
    for (int64_t i = 0; i < kTokens; ++i) {
      const int64_t token = t + i < count ? t + i : count - 1;
      k[i] = keys + token * row;
      phase[i] = phases + token * phase_stride;
    }
    for (int64_t b = 0; b < blocks; ++b)
      for (int64_t l = 0; l < 16; l += lanes) {
        V x[kTokens], y[kTokens];
        for (int i = 0; i < kTokens; ++i) {
          const V c = hn::LoadU(d, phase[i] + 16 * b + l), s = hn::LoadU(d, phase[i] + half + 16 * b + l);
          const V a = hn::LoadU(d, k[i] + 32 * b + l), e = hn::LoadU(d, k[i] + 32 * b + 16 + l);
          x[i] = hn::NegMulAdd(e, s, hn::Mul(a, c));
          y[i] = hn::MulAdd(e, c, hn::Mul(a, s));
        }
        for (int r = 0; r < R; ++r) {
          const V u = hn::LoadU(d, q + r * row + 32 * b + l), v = hn::LoadU(d, q + r * row + 32 * b + 16 + l);
          for (int i = 0; i < kTokens; ++i)
            sum[r * kTokens + i] = hn::MulAdd(u, x[i], hn::MulAdd(v, y[i], sum[r * kTokens + i]));
        }
      }
    int n = kRows * kTokens;
#if HWY_TARGET != HWY_SCALAR  // whose vectors have one lane
    for (int64_t width = lanes; width > 1; width /= 2, n /= 2)
      for (int i = 0; i < n / 2; ++i)
        sum[i] = hn::Add(hn::ConcatEven(d, sum[2 * i + 1], sum[2 * i]), hn::ConcatOdd(d, sum[2 * i + 1], sum[2 * i]));
#endif
    HWY_ALIGN float all[kRows * kTokens];
    for (int i = 0; i < n; ++i) hn::StoreU(sum[i], d, all + i * lanes);
    for (int64_t r = 0; r < R; ++r)
      for (int64_t i = 0; i < kTokens && t + i < count; ++i) out[r * out_stride + t + i] = all[r * kTokens + i];
  }
}

void ScorePairs(const float* keys, const float* phases, int64_t phase_stride, int64_t half, const float* q,
                int64_t blocks, int64_t rows, int64_t count, float* out, int64_t out_stride) {
  for (int64_t r = 0; r < rows; r += 4) {
    const auto run = rows - r >= 4   ? score_pair_rows<4>
                     : rows - r == 3 ? score_pair_rows<3>
                     : rows - r == 2 ? score_pair_rows<2>
                                     : score_pair_rows<1>;
    run(keys, phases, phase_stride, half, q + r * 32 * blocks, blocks, count, out + r * out_stride, out_stride);
  }
}

float RowMax(const float* s, int64_t n) {
  const D d;
  V top = hn::Set(d, -std::numeric_limits<float>::infinity()), sum = hn::Zero(d);
  for (int64_t i = 0; i < n; i += static_cast<int64_t>(hn::Lanes(d))) {
    top = hn::Max(top, hn::LoadU(d, s + i));
    sum = hn::Add(sum, hn::LoadU(d, s + i));  // a maximum may lose a NaN, a sum never
  }
  const float all = hn::GetLane(hn::SumOfLanes(d, sum));
  return all != all ? all : hn::GetLane(hn::MaxOfLanes(d, top));
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

void ValueRange(const float* s, int64_t n, float* low, float* high) {
  const D d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  V least = hn::Set(d, s[0]), most = least;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const V v = hn::LoadU(d, s + i);
    least = hn::Min(least, v);
    most = hn::Max(most, v);
  }
  *low = hn::GetLane(hn::MinOfLanes(d, least));
  *high = hn::GetLane(hn::MaxOfLanes(d, most));
  for (; i < n; ++i) {
    *low = std::min(*low, s[i]);
    *high = std::max(*high, s[i]);
  }
}

void QuantizeRow(const float* x, int64_t n, float low, float inverse, float top, uint8_t* lower, uint8_t* upper,
                 float step, float* under, float* over) {
  const D d;
  const hn::RebindToSigned<D> di;
  const hn::Rebind<uint8_t, D> d8;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  V least = hn::Zero(d), most = hn::Zero(d);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const V above = hn::Sub(hn::LoadU(d, x + i), hn::Set(d, low));
    const auto q =
        hn::ConvertTo(di, hn::Min(hn::Set(d, top), hn::Add(hn::Mul(above, hn::Set(d, inverse)), hn::Set(d, 0.5f))));
    hn::StoreU(hn::DemoteTo(d8, hn::And(q, hn::Set(di, 255))), d8, lower + i);
    if (upper) {
      hn::StoreU(hn::DemoteTo(d8, hn::ShiftRight<8>(q)), d8, upper + i);
      continue;
    }
    const V error = hn::Sub(above, hn::Mul(hn::ConvertTo(d, q), hn::Set(d, step)));
    least = hn::Min(least, error);
    most = hn::Max(most, error);
  }
  if (!upper) {
    *under = std::min(*under, hn::GetLane(hn::MinOfLanes(d, least)));
    *over = std::max(*over, hn::GetLane(hn::MaxOfLanes(d, most)));
  }
  for (; i < n; ++i) {
    const float above = x[i] - low;
    const auto q = static_cast<int32_t>(std::min(top, above * inverse + 0.5f));
    lower[i] = static_cast<uint8_t>(q & 255);
    if (upper) {
      upper[i] = static_cast<uint8_t>(q >> 8);
      continue;
    }
    const float error = above - static_cast<float>(q) * step;
    *under = std::min(*under, error);
    *over = std::max(*over, error);
  }
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

HWY_EXPORT(MultiplyTransposed);
HWY_EXPORT(AddByCode);
HWY_EXPORT(SumByCode);
HWY_EXPORT(ScorePairs);
HWY_EXPORT(RowMax);
HWY_EXPORT(ExpRow);
HWY_EXPORT(RangeSum);
HWY_EXPORT(ValueRange);
HWY_EXPORT(QuantizeRow);
HWY_EXPORT(AddScaled);

void multiply_transposed(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t m,
                         int64_t k, int64_t n) {
  HWY_DYNAMIC_DISPATCH(MultiplyTransposed)(a, lda, b, ldb, c, ldc, m, k, n);
}
void add_by_code(const float* weights, int64_t lanes, const uint16_t* codes, int64_t code_stride, int64_t slots,
                 int64_t count, float* sums, int64_t sums_stride) {
  HWY_DYNAMIC_DISPATCH(AddByCode)(weights, lanes, codes, code_stride, slots, count, sums, sums_stride);
}
void sum_by_code(const float* words, int64_t words_stride, int64_t lanes, const uint16_t* codes, int64_t code_stride,
                 int64_t slots, int64_t count, float* out) {
  HWY_DYNAMIC_DISPATCH(SumByCode)(words, words_stride, lanes, codes, code_stride, slots, count, out);
}
void score_pairs(const float* keys, const float* phases, int64_t phase_stride, int64_t half, const float* q,
                 int64_t blocks, int64_t rows, int64_t count, float* out, int64_t out_stride) {
  HWY_DYNAMIC_DISPATCH(ScorePairs)(keys, phases, phase_stride, half, q, blocks, rows, count, out, out_stride);
}
float row_max(const float* s, int64_t n) { return HWY_DYNAMIC_DISPATCH(RowMax)(s, n); }
float exp_row(float* s, int64_t n, float top) { return HWY_DYNAMIC_DISPATCH(ExpRow)(s, n, top); }
float range_sum(const float* s, int64_t first, int64_t last) { return HWY_DYNAMIC_DISPATCH(RangeSum)(s, first, last); }
void value_range(const float* s, int64_t n, float* low, float* high) {
  HWY_DYNAMIC_DISPATCH(ValueRange)(s, n, low, high);
}
void quantize_row(const float* x, int64_t n, float low, float inverse, float top, uint8_t* lower, uint8_t* upper,
                  float step, float* under, float* over) {
  HWY_DYNAMIC_DISPATCH(QuantizeRow)(x, n, low, inverse, top, lower, upper, step, under, over);
}
void add_scaled(const float* x, int64_t n, float f, float* y) { HWY_DYNAMIC_DISPATCH(AddScaled)(x, n, f, y); }

}  // namespace vqkv::kernels
#endif
