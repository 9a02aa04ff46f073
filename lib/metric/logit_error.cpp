// Errors of the attention logits over coded keys.
#include "metric/by_head.h"

namespace vqkv {
namespace {

// softmax ignores a constant shift of a row, so the error is centred by its mean over the row's coded keys; the mean
// itself is the bias, which moves mass between coded and exact keys. The slope of s^ on s (both centred) is below 1 for
// coders that shrink inner products.
class LogitError final : public Metric {
 public:
  void add(const FidelitySample& s) override {
    const AttentionRows& r = s.rows();
    double squared = 0, count = 0, bias = 0, rows = 0, cross = 0, energy = 0;
    for (int64_t i = 0; i < r.s.rows; ++i) {
      const int64_t begin = r.coded_begin[static_cast<size_t>(i)], end = r.coded_end[static_cast<size_t>(i)];
      if (end - begin < 2) continue;
      const float *a = r.s.row(i), *b = r.s_hat.row(i);
      const double n = static_cast<double>(end - begin);
      double mean_s = 0, mean_e = 0;
      for (int64_t j = begin; j < end; ++j) {
        mean_s += a[j];
        mean_e += static_cast<double>(b[j]) - a[j];
      }
      mean_s /= n;
      mean_e /= n;
      for (int64_t j = begin; j < end; ++j) {
        const double e = static_cast<double>(b[j]) - a[j] - mean_e, x = a[j] - mean_s;
        squared += e * e;
        cross += x * (x + e);
        energy += x * x;
      }
      count += n;
      bias += mean_e;
      rows += 1;
    }
    centred_.add(s, squared, count);
    bias_.add(s, bias, rows);
    slope_.add(s, cross, energy);
  }

  std::vector<Measurement> finish() override {
    return {titled(centred_.measure("logit.centred_rms", "1", Better::kLower, true), "logit rms", Shown::kValue),
            titled(bias_.measure("logit.bias", "1", Better::kNeither), "logit bias", Shown::kNowhere),
            titled(slope_.measure("logit.slope", "1", Better::kNeither), "logit slope", Shown::kNowhere)};
  }

 private:
  ByHead centred_, bias_, slope_;
};

const MetricInfo kLogitErrorInfo{"logit_error",
                                 "centred logit error, bias and inner-product slope over coded keys",
                                 "1",
                                 "rms of (s^ - s) minus its row mean; mean of (s^ - s); regression slope of s^ on s",
                                 "centring: HeadQ, arXiv 2605.03562; slope: TurboQuant, arXiv 2504.19874",
                                 "all coded keys count alike, those that nobody attends to as well",
                                 Better::kLower};

}  // namespace

VQKV_DEFINE_METRIC(logit_error, LogitError, kLogitErrorInfo)

}  // namespace vqkv
