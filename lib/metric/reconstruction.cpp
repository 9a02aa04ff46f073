// Normalised mean squared error of the coded rows: sum |x - x_hat|^2 / sum |x - mean|^2, the mean per channel over the
// rows of one (layer, head, document). Keys after RoPE; the rotation keeps norms, so the numerator is the same before it.
#include <cmath>
#include <map>

#include "metric/metric.h"
#include "metric/statistics.h"

namespace vqkv {
namespace {

class Reconstruction final : public Metric {
 public:
  void add(const FidelitySample& s) override {
    key_.add(s, s.k, s.k_hat, s.coded_last_k);
    value_.add(s, s.v, s.v_hat, s.coded_last_v);
  }
  std::vector<Measurement> finish() override { return {key_.finish("key.nmse"), value_.finish("value.nmse")}; }

 private:
  struct Sums {
    double error = 0, rows = 0;
    std::vector<double> sum, square;
  };
  struct Half {
    std::map<int, std::map<std::pair<int, int>, Sums>> documents;  // document -> (layer, head)

    void add(const FidelitySample& s, ConstMatrix x, ConstMatrix hat, int64_t last) {
      Sums& t = documents[s.document][{s.layer, s.kv_head}];
      t.sum.resize(static_cast<size_t>(x.cols));
      t.square.resize(static_cast<size_t>(x.cols));
      for (int64_t r = s.sinks; r < last; ++r) {
        for (int64_t c = 0; c < x.cols; ++c) {
          const double v = x(r, c), e = v - hat(r, c);
          t.error += e * e;
          t.sum[static_cast<size_t>(c)] += v;
          t.square[static_cast<size_t>(c)] += v * v;
        }
        t.rows += 1;
      }
    }
    Measurement finish(const std::string& tag) const {
      Measurement m;
      m.tag = tag;
      m.unit = "1";
      for (const auto& [document, heads] : documents) {
        double total = 0;
        int64_t n = 0;
        for (const auto& [key, t] : heads) {
          if (t.rows == 0) continue;
          double variance = 0;
          for (size_t c = 0; c < t.sum.size(); ++c) variance += t.square[c] - t.sum[c] * t.sum[c] / t.rows;
          if (variance > 0) total += t.error / variance, ++n;
        }
        if (n > 0) m.per_document.push_back(total / static_cast<double>(n));
      }
      const MeanError e = mean_error(m.per_document);
      m.value = e.n > 0 ? e.mean : std::nan("");
      m.stderr_ = e.error;
      m.n = e.n;
      return m;
    }
  };
  Half key_, value_;
};

class ReconstructionKind final : public MetricKind {
 public:
  MetricInfo describe() const override {
    MetricInfo i;
    i.name = "reconstruction";
    i.title = "Normalised squared error of keys and values";
    i.unit = "1";
    i.formula = "mean over layers and heads of sum |x - x_hat|^2 / sum |x - mean|^2, coded rows";
    i.source = "common practice; as a fraction of the variance, so that 1 is what a constant reaches";
    i.caveat = "does not rank codecs for attention: errors along directions that queries never look at count like any other";
    return i;
  }
  std::unique_ptr<Metric> make() const override { return std::make_unique<Reconstruction>(); }
};

}  // namespace

const MetricKind& vqkv_metric_reconstruction() {
  static const ReconstructionKind kind;
  return kind;
}

}  // namespace vqkv
