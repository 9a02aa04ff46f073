#include "core/rows.h"

#include <algorithm>
#include <cmath>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "core/rows.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <hwy/contrib/math/math-inl.h>

HWY_BEFORE_NAMESPACE();
namespace vqkv {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// hn::Exp takes a NaN for a number far below zero.
template <class D>
HWY_INLINE hn::Vec<D> exp_or_nan(D d, hn::Vec<D> x) {
  return hn::IfThenElse(hn::IsNaN(x), x, hn::Exp(d, x));
}

// As many floats as a vector holds doubles, widened.
template <class D>
HWY_INLINE hn::Vec<D> widened(D d, const float* x) {
  return hn::PromoteTo(d, hn::LoadU(hn::Rebind<float, D>(), x));
}

template <class D>
HWY_INLINE double total(D d, hn::Vec<D> x) {
  return hn::GetLane(hn::SumOfLanes(d, x));
}

float Largest(const float* x, int64_t n) {
  const hn::ScalableTag<float> d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  auto most = hn::Set(d, x[0]);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) most = hn::Max(most, hn::LoadU(d, x + i));
  float out = hn::GetLane(hn::MaxOfLanes(d, most));
  for (; i < n; ++i) out = std::max(out, x[i]);
  return out;
}

double Sum(const float* x, int64_t n) {
  const hn::ScalableTag<double> d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  auto sums = hn::Zero(d);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) sums = hn::Add(sums, widened(d, x + i));
  double out = total(d, sums);
  for (; i < n; ++i) out += static_cast<double>(x[i]);
  return out;
}

void Softmax(const float* s, int64_t n, float* p) {
  const hn::ScalableTag<float> d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const float top = Largest(s, n);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) hn::StoreU(exp_or_nan(d, hn::Sub(hn::LoadU(d, s + i), hn::Set(d, top))), d, p + i);
  for (; i < n; ++i) p[i] = std::exp(s[i] - top);
  const auto scale = static_cast<float>(1.0 / Sum(p, n));
  for (i = 0; i + lanes <= n; i += lanes) hn::StoreU(hn::Mul(hn::LoadU(d, p + i), hn::Set(d, scale)), d, p + i);
  for (; i < n; ++i) p[i] *= scale;
}

double SumOfExp(const float* x, int64_t n, double from) {
  const hn::ScalableTag<double> d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  auto sums = hn::Zero(d);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) sums = hn::Add(sums, exp_or_nan(d, hn::Sub(widened(d, x + i), hn::Set(d, from))));
  double out = total(d, sums);
  for (; i < n; ++i) out += std::exp(static_cast<double>(x[i]) - from);
  return out;
}

RowDistance Distance(const float* p, const float* q, const float* a, const float* b, double gap, int64_t n) {
  const hn::ScalableTag<double> d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  auto kl = hn::Zero(d), l1 = hn::Zero(d);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const auto weight = widened(d, p + i);
    const auto difference = hn::Sub(hn::Sub(widened(d, a + i), widened(d, b + i)), hn::Set(d, gap));
    kl = hn::MulAdd(weight, difference, kl);
    l1 = hn::Add(l1, hn::Abs(hn::Sub(weight, widened(d, q + i))));
  }
  RowDistance out{total(d, kl), total(d, l1)};
  for (; i < n; ++i) {
    out.kl += p[i] * (static_cast<double>(a[i]) - b[i] - gap);
    out.l1 += std::fabs(static_cast<double>(p[i]) - q[i]);
  }
  return out;
}

}  // namespace HWY_NAMESPACE
}  // namespace vqkv
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace vqkv {
HWY_EXPORT(Largest);
HWY_EXPORT(Sum);
HWY_EXPORT(Softmax);
HWY_EXPORT(SumOfExp);
HWY_EXPORT(Distance);

float largest(const float* x, int64_t n) { return HWY_DYNAMIC_DISPATCH(Largest)(x, n); }
double sum_of(const float* x, int64_t n) { return HWY_DYNAMIC_DISPATCH(Sum)(x, n); }
void softmax(const float* s, int64_t n, float* p) { HWY_DYNAMIC_DISPATCH(Softmax)(s, n, p); }
double sum_of_exp(const float* x, int64_t n, double from) { return HWY_DYNAMIC_DISPATCH(SumOfExp)(x, n, from); }
RowDistance row_distance(const float* p, const float* q, const float* a, const float* b, double gap, int64_t n) {
  return HWY_DYNAMIC_DISPATCH(Distance)(p, q, a, b, gap, n);
}

}  // namespace vqkv
#endif
