// Divergence of the attention distribution.
#include <algorithm>
#include <cmath>

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
      // ln p - ln q = (a - b) - (lse_a - lse_b); taken from the logits, so a vanishing p_hat stays finite. The gap of
      // the log sums comes from the row's largest probability, and where exp would leave the range of a double from
      // the largest logit of each.
      int64_t top = 0;
      for (int64_t j = 1; j < n; ++j)
        if (p[j] > p[top]) top = j;
      const double top_b = *std::max_element(b, b + n);
      const double from = std::fabs(top_b - a[top]) < 600 ? a[top] : top_b;
      double lse_a = 0, lse_b = 0;
      for (int64_t j = 0; j < n; ++j) {
        lse_a += std::exp(static_cast<double>(a[j]) - a[top]);
        lse_b += std::exp(b[j] - from);
      }
      const double gap = std::log(lse_a) - std::log(lse_b) + (a[top] - from);
      double row = 0;
      for (int64_t j = 0; j < n; ++j) {
        row += p[j] * (static_cast<double>(a[j]) - b[j] - gap);
        tv += 0.5 * std::fabs(static_cast<double>(p[j]) - q[j]);
      }
      kl += std::max(row, 0.0);  // in this order a NaN stays one
      for (int64_t j = r.coded_begin[static_cast<size_t>(i)]; j < r.coded_end[static_cast<size_t>(i)]; ++j)
        coded += p[j];
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
