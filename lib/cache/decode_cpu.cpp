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

}  // namespace HWY_NAMESPACE
}  // namespace vqkv::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace vqkv::kernels {

HWY_EXPORT(LookupRows);
HWY_EXPORT(DecodeLevels);

void lookup_rows(const float* words, int64_t word_stride, const uint16_t* codes, int64_t count, int64_t width,
                 float* rows, int64_t row_stride, bool add) {
  HWY_DYNAMIC_DISPATCH(LookupRows)(words, word_stride, codes, count, width, rows, row_stride, add);
}
void decode_levels(const uint16_t* codes, int64_t count, const float* levels, float offset, const float* scale,
                   const float* zero, float* out, bool add) {
  HWY_DYNAMIC_DISPATCH(DecodeLevels)(codes, count, levels, offset, scale, zero, out, add);
}

}  // namespace vqkv::kernels
#endif
