#include "core/row_products.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "core/row_products.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace vqkv {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

template <class D>
HWY_INLINE hn::Vec<D> load(D d, const float* p) {
  if constexpr (std::is_same_v<hn::TFromD<D>, float>)
    return hn::LoadU(d, p);
  else
    return hn::PromoteTo(d, hn::LoadU(hn::Rebind<float, D>(), p));
}

// Vectors * lanes outputs in registers.
template <int Vectors, class T>
HWY_INLINE void columns(const T* x, int64_t rows, const float* m, int64_t stride, T* out) {
  const hn::ScalableTag<T> d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  hn::Vec<decltype(d)> sum[Vectors];
  for (int v = 0; v < Vectors; ++v) sum[v] = hn::LoadU(d, out + v * lanes);
  for (int64_t i = 0; i < rows; ++i, m += stride) {
    if (x[i] == 0) continue;
    const auto factor = hn::Set(d, x[i]);
    for (int v = 0; v < Vectors; ++v) sum[v] = hn::Add(sum[v], hn::Mul(factor, load(d, m + v * lanes)));
  }
  for (int v = 0; v < Vectors; ++v) hn::StoreU(sum[v], d, out + v * lanes);
}

template <class T>
HWY_INLINE void row_product(const T* x, int64_t rows, const float* m, int64_t cols, T* out) {
  const auto lanes = static_cast<int64_t>(hn::Lanes(hn::ScalableTag<T>()));
  int64_t c = 0;
  for (; c + 8 * lanes <= cols; c += 8 * lanes) columns<8>(x, rows, m + c, cols, out + c);
  for (; c + 2 * lanes <= cols; c += 2 * lanes) columns<2>(x, rows, m + c, cols, out + c);
  if (c == cols) return;
  for (int64_t i = 0; i < rows; ++i) {
    if (x[i] == 0) continue;
    for (int64_t j = c; j < cols; ++j) out[j] += x[i] * m[i * cols + j];
  }
}
void row_product_f32(const float* x, int64_t rows, const float* m, int64_t cols, float* out) {
  row_product(x, rows, m, cols, out);
}
void row_product_f64(const double* x, int64_t rows, const float* m, int64_t cols, double* out) {
  row_product(x, rows, m, cols, out);
}

template <int Vectors>
HWY_INLINE void add_columns(const float* const* rows, int64_t count, int64_t c, double* out) {
  const hn::ScalableTag<double> d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  hn::Vec<decltype(d)> sum[Vectors];
  for (int v = 0; v < Vectors; ++v) sum[v] = hn::LoadU(d, out + c + v * lanes);
  for (int64_t i = 0; i < count; ++i)
    for (int v = 0; v < Vectors; ++v) sum[v] = hn::Add(sum[v], load(d, rows[i] + c + v * lanes));
  for (int v = 0; v < Vectors; ++v) hn::StoreU(sum[v], d, out + c + v * lanes);
}

void sum_rows(const float* const* rows, int64_t count, int64_t cols, double* out) {
  const auto lanes = static_cast<int64_t>(hn::Lanes(hn::ScalableTag<double>()));
  int64_t c = 0;
  for (; c + 8 * lanes <= cols; c += 8 * lanes) add_columns<8>(rows, count, c, out);
  for (; c + lanes <= cols; c += lanes) add_columns<1>(rows, count, c, out);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = c; j < cols; ++j) out[j] += rows[i][j];
}

// sum[j..] += left[r] * v(r, j..) over the rows, Vectors * lanes of them in registers.
template <int Vectors>
HWY_INLINE void outer_columns(const double* left, const double* v, int64_t rows, int64_t n, double* sum) {
  const hn::ScalableTag<double> d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  hn::Vec<decltype(d)> total[Vectors];
  for (int i = 0; i < Vectors; ++i) total[i] = hn::LoadU(d, sum + i * lanes);
  for (int64_t r = 0; r < rows; ++r, v += n) {
    const auto factor = hn::Set(d, left[r]);
    for (int i = 0; i < Vectors; ++i) total[i] = hn::Add(total[i], hn::Mul(factor, hn::LoadU(d, v + i * lanes)));
  }
  for (int i = 0; i < Vectors; ++i) hn::StoreU(total[i], d, sum + i * lanes);
}

void outer_products(const double* v, const double* weight, int64_t rows, int64_t n, double* sum) {
  const auto lanes = static_cast<int64_t>(hn::Lanes(hn::ScalableTag<double>()));
  std::vector<double> left(static_cast<size_t>(rows));
  for (int64_t i = 0; i < n; ++i, sum += n) {
    for (int64_t r = 0; r < rows; ++r) left[static_cast<size_t>(r)] = weight ? weight[r] * v[r * n + i] : v[r * n + i];
    int64_t j = 0;
    for (; j <= i && j + 4 * lanes <= n; j += 4 * lanes) outer_columns<4>(left.data(), v + j, rows, n, sum + j);
    for (; j <= i && j + lanes <= n; j += lanes) outer_columns<1>(left.data(), v + j, rows, n, sum + j);
    for (; j <= i; ++j)
      for (int64_t r = 0; r < rows; ++r) sum[j] += left[static_cast<size_t>(r)] * v[r * n + j];
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace vqkv
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace vqkv {
HWY_EXPORT(row_product_f32);
HWY_EXPORT(row_product_f64);
HWY_EXPORT(sum_rows);
HWY_EXPORT(outer_products);

void add_row_product(const float* x, int64_t rows, const float* m, int64_t cols, float* out) {
  HWY_DYNAMIC_DISPATCH(row_product_f32)(x, rows, m, cols, out);
}
void add_row_product(const double* x, int64_t rows, const float* m, int64_t cols, double* out) {
  HWY_DYNAMIC_DISPATCH(row_product_f64)(x, rows, m, cols, out);
}
void add_rows(const float* const* rows, int64_t count, int64_t cols, double* out) {
  HWY_DYNAMIC_DISPATCH(sum_rows)(rows, count, cols, out);
}
void add_outer_products(const double* v, const double* weight, int64_t rows, int64_t n, double* sum) {
  HWY_DYNAMIC_DISPATCH(outer_products)(v, weight, rows, n, sum);
}
}  // namespace vqkv
#endif
