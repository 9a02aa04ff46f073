#include "cache/decode_cpu.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cache/decode_cpu.cpp"
#include <hwy/foreach_target.h>  // compiles this file once per target
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace vqkv::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using D = hn::CappedTag<float, 16>;
using V = hn::Vec<D>;

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

template <int S>
HWY_INLINE void sum_pair_stages(const float* HWY_RESTRICT words, int64_t book, const uint16_t* const* a,
                                const uint16_t* const* b, int64_t count, float* HWY_RESTRICT out, int64_t out_stride,
                                bool add) {
  const D d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  for (int64_t t = 0; t < count; ++t)
    for (int64_t i = 0; i < 16; i += lanes) {
      float* to = out + t * out_stride + i;
      V x = add ? hn::LoadU(d, to) : hn::Zero(d), y = add ? hn::LoadU(d, to + 16) : hn::Zero(d);
      for (int s = 0; s < S; ++s) {
        const float *first = words + s * book + int64_t{a[s][t]} * 32 + i,
                    *second = words + s * book + int64_t{b[s][t]} * 32 + i;
        x = hn::Sub(hn::Add(x, hn::LoadU(d, first)), hn::LoadU(d, second + 16));
        y = hn::Add(hn::Add(y, hn::LoadU(d, first + 16)), hn::LoadU(d, second));
      }
      hn::StoreU(x, d, to);
      hn::StoreU(y, d, to + 16);
    }
}

// As many stages at once as keep their books in a first-level cache of 32 KiB beside what is summed.
void SumPairs(const float* words, int64_t entries, const uint16_t* const* a, const uint16_t* const* b, int64_t stages,
              int64_t count, float* out, int64_t out_stride) {
  const int64_t book = entries * 32, most = (24 << 10) / (4 * book);
  const auto together = static_cast<int64_t>(most < 1 ? 1 : most > 3 ? 3 : most);
  for (int64_t s = 0; s < stages;) {
    const int64_t n = stages - s < together ? stages - s : together;
    const auto run = n == 3 ? sum_pair_stages<3> : n == 2 ? sum_pair_stages<2> : sum_pair_stages<1>;
    run(words + s * book, book, a + s, b + s, count, out, out_stride, s > 0);
    s += n;
  }
}

void SumPairMultiples(const int16_t* HWY_RESTRICT words, const uint32_t* HWY_RESTRICT offsets, int64_t stages,
                      int64_t count, float step, float* HWY_RESTRICT out, int64_t out_stride) {
  const hn::CappedTag<int16_t, 32> d16;
  const D d;
  const hn::Rebind<int16_t, D> half;
  const hn::RebindToSigned<D> di;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d)), wide = static_cast<int64_t>(hn::Lanes(d16));
  const V scale = hn::Set(d, step);
  HWY_ALIGN int16_t first[32], second[32];
  for (int64_t t = 0; t < count; ++t) {
    for (int64_t i = 0; i < 32; i += wide) {
      auto a = hn::Zero(d16), b = hn::Zero(d16);
      const uint32_t *at_a = offsets + t, *at_b = offsets + stages * 64 + t;
      for (int64_t s = 0; s < stages; ++s) {
        a = hn::Add(a, hn::LoadU(d16, words + at_a[s * 64] + i));
        b = hn::Add(b, hn::LoadU(d16, words + at_b[s * 64] + i));
      }
      hn::Store(a, d16, first + i);
      hn::Store(b, d16, second + i);
    }
    for (int64_t i = 0; i < 16; i += lanes) {
      const auto x = hn::Sub(hn::LoadU(half, first + i), hn::LoadU(half, second + 16 + i)),
                 y = hn::Add(hn::LoadU(half, first + 16 + i), hn::LoadU(half, second + i));
      hn::StoreU(hn::Mul(scale, hn::ConvertTo(d, hn::PromoteTo(di, x))), d, out + t * out_stride + i);
      hn::StoreU(hn::Mul(scale, hn::ConvertTo(d, hn::PromoteTo(di, y))), d, out + t * out_stride + 16 + i);
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace vqkv::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace vqkv::kernels {

HWY_EXPORT(LookupRows);
HWY_EXPORT(DecodeLevels);
HWY_EXPORT(SumPairs);
HWY_EXPORT(SumPairMultiples);

void lookup_rows(const float* words, int64_t word_stride, const uint16_t* codes, int64_t count, int64_t width,
                 float* rows, int64_t row_stride, bool add) {
  HWY_DYNAMIC_DISPATCH(LookupRows)(words, word_stride, codes, count, width, rows, row_stride, add);
}
void decode_levels(const uint16_t* codes, int64_t count, const float* levels, float offset, const float* scale,
                   const float* zero, float* out, bool add) {
  HWY_DYNAMIC_DISPATCH(DecodeLevels)(codes, count, levels, offset, scale, zero, out, add);
}
void sum_pairs(const float* words, int64_t entries, const uint16_t* const* a, const uint16_t* const* b, int64_t stages,
               int64_t count, float* out, int64_t out_stride) {
  HWY_DYNAMIC_DISPATCH(SumPairs)(words, entries, a, b, stages, count, out, out_stride);
}
void sum_pair_multiples(const int16_t* words, const uint32_t* offsets, int64_t stages, int64_t count, float step,
                        float* out, int64_t out_stride) {
  HWY_DYNAMIC_DISPATCH(SumPairMultiples)(words, offsets, stages, count, step, out, out_stride);
}

}  // namespace vqkv::kernels
#endif
