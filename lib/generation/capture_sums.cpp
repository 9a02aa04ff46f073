// The sums over queries that a trace keeps.
#include <algorithm>
#include <cmath>
#include <vector>

#include "core/cpu.h"
#include "core/gemm.h"
#include "core/thread_pool.h"
#include "generation/capture.h"

namespace vqkv {
namespace {

constexpr int64_t kMomentRows = 16;   // rows of the moment a task owns: 16 x 128 doubles stay in the first-level cache
constexpr int64_t kMassQueries = 64;  // queries scored at once: bounds the score matrix at 64 x group x context

// Rows [first, first + count) of the upper triangle, all positions in order: the order of additions into one element
// does not depend on the instruction set or the number of threads.
[[gnu::always_inline]] inline void moment_rows(const double* x, int64_t n, int64_t d, int64_t first, int64_t count,
                                               double* moment) {
  for (int64_t t = 0; t < n; ++t) {
    const double* row = x + t * d;
    for (int64_t i = first; i < first + count; ++i) {
      const double a = row[i];
      double* out = moment + i * d;
      for (int64_t j = first; j < d; ++j) out[j] += a * row[j];
    }
  }
}
void moment_rows_base(const double* x, int64_t n, int64_t d, int64_t first, int64_t count, double* moment) {
  moment_rows(x, n, d, first, count, moment);
}
#if VQKV_X86_UNITS
__attribute__((target("avx2"))) void moment_rows_avx2(const double* x, int64_t n, int64_t d, int64_t first,
                                                      int64_t count, double* moment) {
  moment_rows(x, n, d, first, count, moment);
}
__attribute__((target("avx512f,avx512vl,avx512dq,prefer-vector-width=512"))) void moment_rows_avx512(
    const double* x, int64_t n, int64_t d, int64_t first, int64_t count, double* moment) {
  moment_rows(x, n, d, first, count, moment);
}
#endif

auto widest_moment_rows() {
#if VQKV_X86_UNITS
  if (cpu_features().avx512) return moment_rows_avx512;
  if (cpu_features().avx2) return moment_rows_avx2;
#endif
  return moment_rows_base;
}

}  // namespace

void add_moment(ConstMatrix q, int heads, double* moment) {
  const int64_t n = q.rows, d = q.cols / heads;
  VQKV_CHECK(q.cols % heads == 0);
  // Heads one after another under each other, in double.
  std::vector<double> x(static_cast<size_t>(n * heads * d));
  parallel_for(heads, [&](int64_t h) {
    for (int64_t t = 0; t < n; ++t)
      for (int64_t c = 0; c < d; ++c)
        x[static_cast<size_t>((h * n + t) * d + c)] = static_cast<double>(q(t, h * d + c));
  });
  const auto rows = widest_moment_rows();
  const int64_t tasks = (d + kMomentRows - 1) / kMomentRows;
  std::vector<double> sum(static_cast<size_t>(d * d), 0.0);
  parallel_for(tasks, [&](int64_t i) {
    const int64_t first = i * kMomentRows;
    rows(x.data(), n * heads, d, first, std::min(kMomentRows, d - first), sum.data());
  });
  for (int64_t i = 0; i < d; ++i)
    for (int64_t j = 0; j < d; ++j) moment[i * d + j] += sum[static_cast<size_t>(std::min(i, j) * d + std::max(i, j))];
}

void add_query_pair_moment(ConstMatrix q, int heads, int rotary_dim, double* pairs) {
  const int64_t d = q.cols / heads, half = rotary_dim / 2;
  for (int64_t p = 0; p < d / 2; ++p) {
    const int64_t a = p < half ? p : 2 * p, b = p < half ? p + half : 2 * p + 1;
    double sum = 0;
    for (int h = 0; h < heads; ++h)
      for (int64_t t = 0; t < q.rows; ++t) {
        const double x = static_cast<double>(q(t, h * d + a)), y = static_cast<double>(q(t, h * d + b));
        sum += x * x + y * y;
      }
    pairs[p] += sum;
  }
}

void add_received_mass(ConstMatrix q, int heads, std::span<const int32_t> position, ConstMatrix k, float scale,
                       double* mass, double* mass2) {
  const int64_t d = q.cols / heads, m = q.rows;
  VQKV_CHECK(static_cast<int64_t>(position.size()) == m && k.cols == d);
  for (int64_t first = 0; first < m; first += kMassQueries) {
    const int64_t count = std::min(kMassQueries, m - first), rows = count * heads;
    int64_t keys = 0;
    for (int64_t i = 0; i < count; ++i) keys = std::max<int64_t>(keys, position[static_cast<size_t>(first + i)] + 1);
    VQKV_CHECK(keys <= k.rows);
    Matrix<float> stacked(rows, d), p(rows, keys);
    for (int64_t i = 0; i < count; ++i)
      for (int h = 0; h < heads; ++h) std::copy_n(q.row(first + i) + h * d, d, stacked.row(i * heads + h));
    gemm(stacked, k.slice_rows(0, keys), true, p);
    // Each row becomes its probabilities; beyond its own position they are zero.
    parallel_for(rows, [&](int64_t r) {
      float* row = p.row(r);
      const int64_t visible = position[static_cast<size_t>(first + r / heads)] + 1;
      float top = row[0] * scale;
      for (int64_t t = 0; t < visible; ++t) {
        row[t] *= scale;
        top = std::max(top, row[t]);
      }
      double sum = 0;
      for (int64_t t = 0; t < visible; ++t) {
        row[t] = std::exp(row[t] - top);
        sum += static_cast<double>(row[t]);
      }
      const float inverse = static_cast<float>(1.0 / sum);
      for (int64_t t = 0; t < visible; ++t) row[t] *= inverse;
      std::fill(row + visible, row + keys, 0.0f);
    });
    // Token ranges are independent; within one, rows are added in order.
    constexpr int64_t kRange = 256;
    parallel_for((keys + kRange - 1) / kRange, [&](int64_t range) {
      const int64_t from = range * kRange, to = std::min(keys, from + kRange);
      for (int64_t r = 0; r < rows; ++r) {
        const float* row = p.row(r);
        for (int64_t t = from; t < to; ++t) {
          const double v = static_cast<double>(row[t]);
          mass[t] += v;
          mass2[t] += v * v;
        }
      }
    });
  }
}

}  // namespace vqkv
