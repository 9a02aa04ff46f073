#include "metric/metric.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "codec/score_map.h"
#include "core/error.h"
#include "core/finite.h"
#include "core/gemm.h"
#include "core/names.h"
#include "core/rows.h"
#include "core/thread_pool.h"

namespace vqkv {

#define VQKV_METRIC(name) const MetricKind& vqkv_metric_##name();
#include "metric/metrics.inc"
#undef VQKV_METRIC

const std::vector<const MetricKind*>& all_metrics() {
  static const std::vector<const MetricKind*> all{
#define VQKV_METRIC(name) &vqkv_metric_##name(),
#include "metric/metrics.inc"
#undef VQKV_METRIC
  };
  return all;
}

const MetricKind& find_metric(const std::string& name) {
  std::vector<std::string> names;
  for (const MetricKind* m : all_metrics()) {
    names.push_back(m->describe().name);
    if (names.back() == name) return *m;
  }
  fail_unknown("metric", name, names);
}

namespace {

void fill_rows(const FidelitySample& x, AttentionRows& r) {
  const int64_t rows = x.q.rows, n = x.k.rows;
  VQKV_CHECK(rows == static_cast<int64_t>(x.query_position.size()) * x.group && x.k_hat.rows == n && x.v.rows == n);
  for (Matrix<float>* m : {&r.s, &r.s_hat, &r.p, &r.p_hat}) m->reshape(rows, n);
  r.tokens.resize(static_cast<size_t>(rows));
  r.coded_begin.resize(r.tokens.size());
  r.coded_end.resize(r.tokens.size());
  gemm(x.q, x.k, true, r.s);
  Matrix<float> coded_q;
  if (!x.query.exact()) {
    coded_q = Matrix<float>(rows, x.q.cols);
    for (int64_t i = 0; i < rows; ++i) x.query.in_keys(x.q.row(i), coded_q.row(i));
  }
  gemm(x.query.exact() ? x.q : ConstMatrix(coded_q), x.k_hat, true, r.s_hat);
  parallel_for(rows, [&](int64_t i) {
    const size_t query = static_cast<size_t>(i / x.group);
    const int64_t length = x.query_position[query] + 1;
    VQKV_CHECK(length >= 1 && length <= n);
    const int64_t begin = std::min(x.sinks, length), end = std::clamp(x.coded_end_k[query], begin, length);
    float *s = r.s.row(i), *hat = r.s_hat.row(i);
    for (int64_t j = 0; j < length; ++j) s[j] *= x.score_scale;
    for (int64_t j = begin; j < end; ++j) hat[j] *= x.score_scale;
    std::copy(s, s + begin, hat);
    std::copy(s + end, s + length, hat + end);
    for (const float* row : {s, hat})
      if (const int64_t bad = first_not_finite(row, length); bad >= 0)
        fail_data(fmt::format("layer {}, KV head {}, document {}: the {} logit of token {} for the query at {} is {}",
                              x.layer, x.kv_head, x.document, row == s ? "exact" : "coded", bad, length - 1, row[bad]));
    map_scores(x.score, hat + begin, end - begin);
    if (x.dropped) std::fill(hat + begin, hat + end, -std::numeric_limits<float>::infinity());
    for (auto [logits, p] : {std::pair(s, r.p.row(i)), std::pair(hat, r.p_hat.row(i))}) {
      softmax(logits, length, p);
      std::fill(p + length, p + n, 0.0f);
    }
    const size_t k = static_cast<size_t>(i);
    r.tokens[k] = length;
    r.coded_begin[k] = begin;
    r.coded_end[k] = end;
  });
}

}  // namespace

void FidelitySample::build_rows(std::shared_ptr<AttentionRows> room) {
  fill_rows(*this, *room);
  rows_ = std::move(room);
}

const AttentionRows& FidelitySample::rows() const {
  VQKV_CHECK(rows_ != nullptr);
  return *rows_;
}

}  // namespace vqkv
