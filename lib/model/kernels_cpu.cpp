#include "model/kernels_cpu.h"

#include <algorithm>
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

// Sum of body(i) over [0, n) as eight partial sums in double, the same on every processor.
template <class Body>
HWY_INLINE double eight_sums(int64_t n, Body&& body) {
  double sum[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int j = 0; j < 8; ++j) sum[j] += body(i + j);
  for (; i < n; ++i) sum[i % 8] += body(i);
  return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

// body(d, i) for whole vectors of [0, n), then for single elements.
template <class Body>
HWY_INLINE void for_vectors(int64_t n, Body&& body) {
  const hn::ScalableTag<float> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) body(d, i);
  const hn::CappedTag<float, 1> one;
  for (; i < n; ++i) body(one, i);
}

void norm(const float* x, const float* HWY_RESTRICT weight, double eps, float* out, int64_t n) {
  const double total =
      eight_sums(n, [&](int64_t i) HWY_ATTR { return static_cast<double>(x[i]) * static_cast<double>(x[i]); });
  const float scale = static_cast<float>(1.0 / std::sqrt(total / static_cast<double>(n) + eps));
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * scale * weight[i];
}

// 1 + exp(-g), infinite for very negative g: quotients by it are then the zero that they should be. hn::Exp is defined
// up to 104 and gives any number beyond.
template <class D>
HWY_INLINE hn::Vec<D> sigmoid_denominator(D d, hn::Vec<D> g) {
  return hn::Add(hn::Set(d, 1.0f), hn::Exp(d, hn::Min(hn::Neg(g), hn::Set(d, 104.0f))));
}

template <class D>
HWY_INLINE hn::Vec<D> gated(D d, hn::Vec<D> g, hn::Vec<D> u) {
  return hn::Mul(hn::Div(g, sigmoid_denominator(d, g)), u);
}

void gate_rows(float* HWY_RESTRICT gate, const float* HWY_RESTRICT up, int64_t n) {
  for_vectors(n, [&](auto d, int64_t i)
                     HWY_ATTR { hn::StoreU(gated(d, hn::LoadU(d, gate + i), hn::LoadU(d, up + i)), d, gate + i); });
}

void add(float* HWY_RESTRICT x, const float* HWY_RESTRICT bias, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] += bias[i];
}

void norm_backward(const float* x, const float* HWY_RESTRICT weight, double eps, const float* dout, float* dx,
                   int64_t n, bool accumulate) {
  const double size = static_cast<double>(n);
  const double square =
      eight_sums(n, [&](int64_t i) HWY_ATTR { return static_cast<double>(x[i]) * static_cast<double>(x[i]); });
  const double dot = eight_sums(n, [&](int64_t i) HWY_ATTR {
    return static_cast<double>(x[i]) * static_cast<double>(weight[i]) * static_cast<double>(dout[i]);
  });
  const double scale = 1.0 / std::sqrt(square / size + eps);
  const float a = static_cast<float>(scale), b = static_cast<float>(scale * scale * scale * dot / size);
  for (int64_t i = 0; i < n; ++i) {
    const float g = a * weight[i] * dout[i] - b * x[i];
    dx[i] = accumulate ? dx[i] + g : g;
  }
}

void gate_rows_backward(float* HWY_RESTRICT gate, float* HWY_RESTRICT up, const float* HWY_RESTRICT dout, int64_t n) {
  for_vectors(n, [&](auto d, int64_t i) HWY_ATTR {
    const auto g = hn::LoadU(d, gate + i), u = hn::LoadU(d, up + i), grad = hn::LoadU(d, dout + i);
    const auto one = hn::Set(d, 1.0f);
    const auto sigmoid = hn::Div(one, sigmoid_denominator(d, g));
    const auto silu = hn::Mul(g, sigmoid);
    // d silu / dg = sigmoid + silu (1 - sigmoid)
    const auto slope = hn::MulAdd(silu, hn::Sub(one, sigmoid), sigmoid);
    hn::StoreU(hn::Mul(hn::Mul(grad, u), slope), d, gate + i);
    hn::StoreU(hn::Mul(grad, silu), d, up + i);
  });
}

ExpSum exp_sum(float* HWY_RESTRICT x, int64_t n) {
  const hn::ScalableTag<float> wide;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(wide));
  float top = x[0];
  int64_t at = 0;
  if (n >= lanes) {
    auto best = hn::LoadU(wide, x);
    for (at = lanes; at + lanes <= n; at += lanes) best = hn::Max(best, hn::LoadU(wide, x + at));
    top = hn::GetLane(hn::MaxOfLanes(wide, best));
  }
  for (; at < n; ++at) top = std::max(top, x[at]);
  for_vectors(n, [&](auto d, int64_t i)
                     HWY_ATTR { hn::StoreU(hn::Exp(d, hn::Sub(hn::LoadU(d, x + i), hn::Set(d, top))), d, x + i); });
  return {top, eight_sums(n, [&](int64_t i) HWY_ATTR { return static_cast<double>(x[i]); })};
}

void max_of_columns(const float* HWY_RESTRICT s, int64_t rows, int64_t n, float* HWY_RESTRICT top) {
  for (int64_t r = 0; r < rows; ++r, s += n)
    for_vectors(n, [&](auto d, int64_t j)
                       HWY_ATTR { hn::StoreU(hn::Max(hn::LoadU(d, top + j), hn::LoadU(d, s + j)), d, top + j); });
}

void exp_of_columns(float* HWY_RESTRICT s, int64_t rows, int64_t n, float scale, const float* HWY_RESTRICT shift) {
  for (int64_t r = 0; r < rows; ++r, s += n)
    for_vectors(n, [&](auto d, int64_t j) HWY_ATTR {
      const auto x = hn::MulSub(hn::LoadU(d, s + j), hn::Set(d, scale), hn::LoadU(d, shift + j));
      hn::StoreU(hn::Exp(d, x), d, s + j);
    });
}

void sum_of_columns(const float* HWY_RESTRICT s, int64_t rows, int64_t n, float* HWY_RESTRICT sum) {
  for (int64_t r = 0; r < rows; ++r, s += n)
    for_vectors(n, [&](auto d, int64_t j)
                       HWY_ATTR { hn::StoreU(hn::Add(hn::LoadU(d, sum + j), hn::LoadU(d, s + j)), d, sum + j); });
}

void backward_of_columns(const float* HWY_RESTRICT p, int64_t rows, int64_t n, float scale,
                         const float* HWY_RESTRICT mean, float* HWY_RESTRICT ds) {
  for (int64_t r = 0; r < rows; ++r, p += n, ds += n)
    for_vectors(n, [&](auto d, int64_t j) HWY_ATTR {
      const auto weight = hn::Mul(hn::LoadU(d, p + j), hn::Set(d, scale));
      hn::StoreU(hn::Mul(weight, hn::Sub(hn::LoadU(d, ds + j), hn::LoadU(d, mean + j))), d, ds + j);
    });
}

}  // namespace HWY_NAMESPACE
}  // namespace vqkv
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace vqkv {
HWY_EXPORT(norm);
HWY_EXPORT(gate_rows);
HWY_EXPORT(add);
HWY_EXPORT(norm_backward);
HWY_EXPORT(gate_rows_backward);
HWY_EXPORT(exp_sum);
HWY_EXPORT(max_of_columns);
HWY_EXPORT(exp_of_columns);
HWY_EXPORT(sum_of_columns);
HWY_EXPORT(backward_of_columns);
void rms_norm(const float* x, const float* weight, double eps, float* out, int64_t n) {
  HWY_DYNAMIC_DISPATCH(norm)(x, weight, eps, out, n);
}
void swiglu(float* gate, const float* up, int64_t n) { HWY_DYNAMIC_DISPATCH(gate_rows)(gate, up, n); }
void add_bias(float* x, const float* bias, int64_t n) { HWY_DYNAMIC_DISPATCH(add)(x, bias, n); }
void rms_norm_backward(const float* x, const float* weight, double eps, const float* dout, float* dx, int64_t n,
                       bool accumulate) {
  HWY_DYNAMIC_DISPATCH(norm_backward)(x, weight, eps, dout, dx, n, accumulate);
}
void swiglu_backward(float* gate, float* up, const float* dout, int64_t n) {
  HWY_DYNAMIC_DISPATCH(gate_rows_backward)(gate, up, dout, n);
}
ExpSum exp_row(float* x, int64_t n) { return HWY_DYNAMIC_DISPATCH(exp_sum)(x, n); }
void column_max(const float* s, int64_t rows, int64_t n, float* top) {
  HWY_DYNAMIC_DISPATCH(max_of_columns)(s, rows, n, top);
}
void exp_columns(float* s, int64_t rows, int64_t n, float scale, const float* shift) {
  HWY_DYNAMIC_DISPATCH(exp_of_columns)(s, rows, n, scale, shift);
}
void add_columns(const float* s, int64_t rows, int64_t n, float* sum) {
  HWY_DYNAMIC_DISPATCH(sum_of_columns)(s, rows, n, sum);
}
void softmax_backward(const float* p, int64_t rows, int64_t n, float scale, const float* mean, float* ds) {
  HWY_DYNAMIC_DISPATCH(backward_of_columns)(p, rows, n, scale, mean, ds);
}
}  // namespace vqkv
#endif
