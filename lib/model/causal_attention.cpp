#include "model/causal_attention.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/gemm.h"
#include "core/small_matrix.h"
#include "model/kernels_cpu.h"

namespace vqkv {
namespace {

// A tile's scores stand keys x queries: sums over keys then run along rows, and the weights are the left side of the
// products that give dk and dv as they are. 128 KiB a tile stay in the second-level cache.
constexpr int64_t kQueries = 128, kKeys = 256;
constexpr float kMasked = -1e30f;

// One tile of queries [first, first + count), and tiles of the keys that any of them sees.
struct Queries {
  int64_t first, count;
  int64_t keys() const { return first + count; }
};

template <class Body>
void for_query_tiles(int64_t n, Body&& body) {
  for (int64_t first = 0; first < n; first += kQueries) body(Queries{first, std::min(kQueries, n - first)});
}
template <class Body>
void for_key_tiles(const Queries& q, Body&& body) {
  for (int64_t first = 0; first < q.keys(); first += kKeys) body(first, std::min(kKeys, q.keys() - first));
}

Matrix<float> transposed(ConstMatrix x) {
  Matrix<float> out(x.cols, x.rows);
  kernels::transpose(x.data, x.stride, x.rows, x.cols, out.data(), x.rows, false);
  return out;
}

MutMatrix tile_of(Matrix<float>& buffer, int64_t keys, int64_t queries) { return {buffer.data(), keys, queries}; }

// Scores of a tile, (keys, queries); what a query doesn't see is kMasked.
void tile_scores(const AttentionHead& h, const Queries& q, int64_t first_key, MutMatrix s) {
  gemm(h.k.slice_rows(first_key, s.rows), h.q.slice_rows(q.first, q.count), true, s);
  for (int64_t r = std::max<int64_t>(0, q.first + 1 - first_key); r < s.rows; ++r)
    std::fill_n(s.row(r), first_key + r - q.first, kMasked);
}

void check(const AttentionHead& h, ConstMatrix out) {
  const int64_t n = h.q.rows, d = h.q.cols;
  VQKV_CHECK(h.k.rows == n && h.v.rows == n && out.rows == n && h.k.cols == d && h.v.cols == d && out.cols == d &&
             h.scale > 0);
}

}  // namespace

void attend_causal(const AttentionHead& h, MutMatrix out, float* log_sum) {
  check(h, out);
  const int64_t n = h.q.rows, d = h.q.cols;
  const Matrix<float> v_t = transposed(h.v);
  Matrix<float> scores(kKeys, kQueries), sums(d, kQueries);
  std::vector<float> top(kQueries), before(kQueries), shift(kQueries), total(kQueries);
  for_query_tiles(n, [&](const Queries& q) {
    const MutMatrix out_t = tile_of(sums, d, q.count);
    std::fill_n(top.data(), q.count, kMasked);
    std::fill_n(total.data(), q.count, 0.0f);
    for_key_tiles(q, [&](int64_t first, int64_t keys) {
      const MutMatrix s = tile_of(scores, keys, q.count);
      tile_scores(h, q, first, s);
      before = top;
      column_max(s.data, keys, q.count, top.data());
      for (int64_t j = 0; j < q.count; ++j) {
        const auto at = static_cast<size_t>(j);
        shift[at] = h.scale * top[at];
        // What is there was measured from the old maximum.
        const float shrink = std::exp(h.scale * (before[at] - top[at]));
        total[at] *= shrink;
        if (first > 0 && shrink != 1)
          for (int64_t c = 0; c < d; ++c) out_t(c, j) *= shrink;
      }
      exp_columns(s.data, keys, q.count, h.scale, shift.data());
      add_columns(s.data, keys, q.count, total.data());
      gemm(v_t.view().slice_cols(first, keys), s, false, out_t, first > 0);
    });
    for (int64_t j = 0; j < q.count; ++j) {
      const auto at = static_cast<size_t>(j);
      const float inverse = 1 / total[at];
      float* row = out.row(q.first + j);
      for (int64_t c = 0; c < d; ++c) row[c] = out_t(c, j) * inverse;
      log_sum[q.first + j] = shift[at] + std::log(total[at]);
    }
  });
}

void attend_causal_backward(const AttentionHead& h, ConstMatrix out, const float* log_sum, ConstMatrix dout,
                            MutMatrix dq, MutMatrix dk, MutMatrix dv) {
  check(h, out);
  const int64_t n = h.q.rows, d = h.q.cols;
  for (const ConstMatrix m : {dout, ConstMatrix(dq), ConstMatrix(dk), ConstMatrix(dv)})
    VQKV_CHECK(m.rows == n && m.cols == d);
  const Matrix<float> k_t = transposed(h.k);
  Matrix<float> scores(kKeys, kQueries), slopes(kKeys, kQueries), sums(d, kQueries);
  std::vector<float> mean(kQueries);
  for_query_tiles(n, [&](const Queries& q) {
    const MutMatrix dq_t = tile_of(sums, d, q.count);
    const ConstMatrix q_rows = h.q.slice_rows(q.first, q.count), dout_rows = dout.slice_rows(q.first, q.count);
    // The weights' gradient is v . dout; its mean under the weights is out . dout.
    for (int64_t j = 0; j < q.count; ++j) {
      double sum = 0;
      for (int64_t c = 0; c < d; ++c)
        sum += static_cast<double>(out(q.first + j, c)) * static_cast<double>(dout_rows(j, c));
      mean[static_cast<size_t>(j)] = static_cast<float>(sum);
    }
    for_key_tiles(q, [&](int64_t first, int64_t keys) {
      const MutMatrix p = tile_of(scores, keys, q.count), ds = tile_of(slopes, keys, q.count);
      tile_scores(h, q, first, p);
      exp_columns(p.data, keys, q.count, h.scale, log_sum + q.first);
      gemm(p, dout_rows, false, dv.slice_rows(first, keys), true);
      gemm(h.v.slice_rows(first, keys), dout_rows, true, ds);
      softmax_backward(p.data, keys, q.count, h.scale, mean.data(), ds.data);
      gemm(ds, q_rows, false, dk.slice_rows(first, keys), true);
      gemm(k_t.view().slice_cols(first, keys), ds, false, dq_t, first > 0);
    });
    kernels::transpose(dq_t.data, q.count, d, q.count, dq.row(q.first), dq.stride, false);
  });
}

}  // namespace vqkv
