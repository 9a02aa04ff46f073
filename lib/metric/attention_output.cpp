// Relative error of the attention output, before and after W_O, and with keys or values alone coded.
#include <algorithm>

#include "core/gemm.h"
#include "metric/by_head.h"

namespace vqkv {
namespace {

class AttentionOutput final : public Metric {
 public:
  void add(const FidelitySample& s) override {
    const AttentionRows& r = s.rows();
    const int64_t rows = r.p.rows, d = s.v.cols;
    v_error_.reshape(s.v.rows, d);
    for (int64_t t = 0; t < s.v.rows; ++t)
      for (int64_t c = 0; c < d; ++c) v_error_(t, c) = s.v_hat(t, c) - s.v(t, c);
    Matrix<float> exact(rows, d), both(rows, d), k_only(rows, d), v_only(rows, d);
    gemm(r.p, s.v, false, exact);
    gemm(r.p_hat, s.v, false, k_only);
    both = k_only;
    v_only = exact;
    gemm(coded_values_only(s, r, r.p_hat), v_error_, false, both, true);
    gemm(coded_values_only(s, r, r.p), v_error_, false, v_only, true);
    relative(s, exact, both, both_);
    relative(s, exact, k_only, k_only_);
    relative(s, exact, v_only, v_only_);
    if (s.w_o.rows == 0) return;
    // After W_O the query heads of the group add up: (queries, group * d) x (group * d, hidden).
    const int64_t queries = rows / s.group;
    const ConstMatrix flat_exact(exact.data(), queries, s.group * d), flat_both(both.data(), queries, s.group * d);
    Matrix<float> a(queries, s.w_o.rows), b(queries, s.w_o.rows);
    gemm(flat_exact, s.w_o, true, a);
    gemm(flat_both, s.w_o, true, b);
    relative(s, a, b, projected_);
  }

  std::vector<Measurement> finish() override {
    const auto error = [](const ByHead& sums, const char* of, const char* title, Shown shown) {
      return titled(sums.measure(std::string("output.relative_error") + of, "1", Better::kLower, true), title, shown);
    };
    std::vector<Measurement> out{error(both_, "", "output error", Shown::kValue),
                                 error(k_only_, "_k_only", "output error, K only", Shown::kNowhere),
                                 error(v_only_, "_v_only", "output error, V only", Shown::kNowhere)};
    if (!projected_.empty()) out.push_back(error(projected_, "_after_wo", "output error after W_O", Shown::kValue));
    return out;
  }

 private:
  // Probabilities with everything but the coded values of each row zeroed.
  const Matrix<float>& coded_values_only(const FidelitySample& s, const AttentionRows& r, const Matrix<float>& p) {
    coded_.reshape(p.rows, p.cols);
    for (int64_t i = 0; i < p.rows; ++i) {
      const int64_t length = r.tokens[static_cast<size_t>(i)];
      const int64_t begin = std::min(s.sinks, length);
      const int64_t end = std::clamp(s.coded_end_v[static_cast<size_t>(i / s.group)], begin, length);
      float* out = coded_.row(i);
      std::fill(out, out + begin, 0.0f);
      std::copy(p.row(i) + begin, p.row(i) + end, out + begin);
      std::fill(out + end, out + p.cols, 0.0f);
    }
    return coded_;
  }

  static void relative(const FidelitySample& s, const Matrix<float>& exact, const Matrix<float>& other, ByHead& sums) {
    double error = 0, energy = 0;
    for (size_t i = 0; i < exact.storage.size(); ++i) {
      const double e = static_cast<double>(other.storage[i]) - exact.storage[i];
      error += e * e;
      energy += static_cast<double>(exact.storage[i]) * exact.storage[i];
    }
    sums.add(s, error, energy);
  }

  ByHead both_, k_only_, v_only_, projected_;
  Matrix<float> v_error_, coded_;  // of the sample at hand; memory for all
};

const MetricInfo kAttentionOutputInfo{
    "attention_output",
    "relative error of the attention output",
    "1",
    "sqrt(sum |o^ - o|^2 / sum |o|^2) over queries; with only keys or only values coded; after this "
    "head's slice of W_O",
    "KVTuner, arXiv 2502.04420; common",
    "",
    Better::kLower,
    true};

}  // namespace

VQKV_DEFINE_METRIC(attention_output, AttentionOutput, kAttentionOutputInfo)

}  // namespace vqkv
