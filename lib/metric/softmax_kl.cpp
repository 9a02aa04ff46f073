// Divergence of the attention distribution.
#include <algorithm>
#include <cmath>

#include "core/rows.h"
#include "metric/by_head.h"

namespace vqkv {
namespace {

class SoftmaxKl final : public Metric {
 public:
  void add(const FidelitySample& s) override {
    const AttentionRows& r = s.rows();
    double kl = 0, tv = 0, coded = 0, rows = 0;
    for (int64_t i = 0; i < r.p.rows; ++i) {
      const int64_t n = r.tokens[static_cast<size_t>(i)];
      const float *p = r.p.row(i), *q = r.p_hat.row(i), *a = r.s.row(i), *b = r.s_hat.row(i);
      // ln p - ln q = (a - b) - (lse_a - lse_b); taken from the logits, so a vanishing p_hat stays finite. Both sums
      // start from the row's largest logit, or where exp would leave the range of a double each from its own.
      const double top = largest(a, n), top_b = largest(b, n);
      const double from = std::fabs(top_b - top) < 600 ? top : top_b;
      const double gap = std::log(sum_of_exp(a, n, top)) - std::log(sum_of_exp(b, n, from)) + (top - from);
      const RowDistance row = row_distance(p, q, a, b, gap, n);
      kl += std::max(row.kl, 0.0);  // in this order a NaN stays one
      tv += row.l1 / 2;
      const int64_t begin = r.coded_begin[static_cast<size_t>(i)], end = r.coded_end[static_cast<size_t>(i)];
      coded += sum_of(p + begin, end - begin);
      rows += 1;
    }
    kl_.add(s, kl, rows);
    tv_.add(s, tv, rows);
    coded_.add(s, coded, rows);
  }

  std::vector<Measurement> finish() override {
    return {titled(kl_.measure("attention.softmax_kl", "nats", Better::kLower), "softmax KL"),
            titled(tv_.measure("attention.total_variation", "1", Better::kLower), "total variation", Shown::kNowhere),
            titled(coded_.measure("attention.coded_mass", "1", Better::kNeither), "coded mass", Shown::kNowhere)};
  }

 private:
  ByHead kl_, tv_, coded_;
};

const MetricInfo kSoftmaxKlInfo{
    "softmax_kl",
    "divergence of the attention distribution",
    "nats",
    "KL(a || a^) a query, a^ with coded keys decoded and sinks and window exact; total variation; "
    "exact mass on coded keys",
    "HeadQ, arXiv 2605.03562; common",
    "says nothing about values",
    Better::kLower};

}  // namespace

VQKV_DEFINE_METRIC(softmax_kl, SoftmaxKl, kSoftmaxKlInfo)

}  // namespace vqkv
