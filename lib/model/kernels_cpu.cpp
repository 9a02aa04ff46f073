#include "model/kernels_cpu.h"

#include <cmath>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "model/kernels_cpu.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <hwy/contrib/math/math-inl.h>

HWY_BEFORE_NAMESPACE();
namespace vqkv {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

void norm(const float* x, const float* HWY_RESTRICT weight, double eps, float* out, int64_t n) {
  // Eight partial sums of squares in double, the same on every processor.
  double sum[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int j = 0; j < 8; ++j) sum[j] += static_cast<double>(x[i + j]) * static_cast<double>(x[i + j]);
  for (; i < n; ++i) sum[i % 8] += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  const double total = ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
  const float scale = static_cast<float>(1.0 / std::sqrt(total / static_cast<double>(n) + eps));
  for (i = 0; i < n; ++i) out[i] = x[i] * scale * weight[i];
}

template <class D>
HWY_INLINE hn::Vec<D> gated(D d, hn::Vec<D> g, hn::Vec<D> u) {
  // exp(-g) overflows to infinity for very negative g, whose quotient is then the zero it should be.
  return hn::Mul(hn::Div(g, hn::Add(hn::Set(d, 1.0f), hn::Exp(d, hn::Neg(g)))), u);
}

void gate_rows(float* HWY_RESTRICT gate, const float* HWY_RESTRICT up, int64_t n) {
  const hn::ScalableTag<float> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) hn::StoreU(gated(d, hn::LoadU(d, gate + i), hn::LoadU(d, up + i)), d, gate + i);
  const hn::CappedTag<float, 1> one;
  for (; i < n; ++i) hn::StoreU(gated(one, hn::LoadU(one, gate + i), hn::LoadU(one, up + i)), one, gate + i);
}

void add(float* HWY_RESTRICT x, const float* HWY_RESTRICT bias, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] += bias[i];
}

}  // namespace HWY_NAMESPACE
}  // namespace vqkv
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace vqkv {
HWY_EXPORT(norm);
HWY_EXPORT(gate_rows);
HWY_EXPORT(add);
void rms_norm(const float* x, const float* weight, double eps, float* out, int64_t n) {
  HWY_DYNAMIC_DISPATCH(norm)(x, weight, eps, out, n);
}
void swiglu(float* gate, const float* up, int64_t n) { HWY_DYNAMIC_DISPATCH(gate_rows)(gate, up, n); }
void add_bias(float* x, const float* bias, int64_t n) { HWY_DYNAMIC_DISPATCH(add)(x, bias, n); }
}  // namespace vqkv
#endif
