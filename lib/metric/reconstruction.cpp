// Key and value reconstruction error, whole, per channel and per position. Keys are compared post-RoPE.
#include "metric/by_head.h"

namespace vqkv {
namespace {

// Squared error over squared norm of the coded tokens; and over their variance per (head, window), where 1 is what a
// constant vector reaches (real keys have large channel means, which flatter the first).
class Nmse : public Metric {
 public:
  explicit Nmse(bool keys) : keys_(keys) {}

  void add(const FidelitySample& s) override {
    const ConstMatrix x = keys_ ? s.k : s.v, hat = keys_ ? s.k_hat : s.v_hat;
    const int64_t begin = s.sinks, end = keys_ ? s.coded_last_k : s.coded_last_v;
    std::vector<double> error(static_cast<size_t>(x.cols)), energy(error.size()), sum(error.size());
    if (static_cast<int64_t>(position_error_.size()) < x.rows) {
      position_error_.resize(static_cast<size_t>(x.rows));
      position_energy_.resize(static_cast<size_t>(x.rows));
    }
    double total_error = 0, total_energy = 0;
    for (int64_t t = begin; t < end; ++t) {
      double row_error = 0, row_energy = 0;
      for (int64_t c = 0; c < x.cols; ++c) {
        const double v = x(t, c), e = v - static_cast<double>(hat(t, c));
        error[static_cast<size_t>(c)] += e * e;
        energy[static_cast<size_t>(c)] += v * v;
        sum[static_cast<size_t>(c)] += v;
        row_error += e * e;
        row_energy += v * v;
      }
      total_error += row_error;
      total_energy += row_energy;
      // Each head weighs the same at a position: its error relative to its own energy.
      if (row_energy > 0) {
        position_error_[static_cast<size_t>(t)] += row_error / row_energy;
        position_energy_[static_cast<size_t>(t)] += 1;
      }
    }
    sums_.add(s, total_error, total_energy);
    double mean_energy = 0;
    for (const double v : sum) mean_energy += end > begin ? v * v / static_cast<double>(end - begin) : 0;
    variance_.add(s, total_error, total_energy - mean_energy);
    auto& channel = channels_[{s.layer, s.kv_head}];
    if (channel.empty()) channel.resize(static_cast<size_t>(2 * x.cols));
    for (int64_t c = 0; c < x.cols; ++c) {
      channel[static_cast<size_t>(c)] += error[static_cast<size_t>(c)];
      channel[static_cast<size_t>(x.cols + c)] += energy[static_cast<size_t>(c)];
    }
  }

  std::vector<Measurement> finish() override {
    const std::string role = keys_ ? "key" : "value";
    Measurement m = titled(sums_.measure(role + ".nmse", "1", Better::kLower), role + " NMSE", Shown::kValue);
    if (!channels_.empty()) {
      const int64_t d = static_cast<int64_t>(channels_.begin()->second.size()) / 2;
      const int64_t layers = channels_.rbegin()->first.first + 1;
      int64_t heads = 0;
      for (const auto& [key, v] : channels_) heads = std::max<int64_t>(heads, key.second + 1);
      Detail by_channel{"layer,kv_head,channel",
                        {layers, heads, d},
                        std::vector<double>(static_cast<size_t>(layers * heads * d), std::nan(""))};
      for (const auto& [key, v] : channels_)
        for (int64_t c = 0; c < d; ++c) {
          const double energy = v[static_cast<size_t>(d + c)];
          by_channel.values[static_cast<size_t>((key.first * heads + key.second) * d + c)] =
              energy > 0 ? v[static_cast<size_t>(c)] / energy : std::nan("");
        }
      m.details.push_back(std::move(by_channel));
    }
    Detail by_position{"position", {static_cast<int64_t>(position_error_.size())}, {}};
    for (size_t t = 0; t < position_error_.size(); ++t)
      by_position.values.push_back(position_energy_[t] > 0 ? position_error_[t] / position_energy_[t] : std::nan(""));
    m.details.push_back(std::move(by_position));
    return {m, titled(variance_.measure(role + ".unexplained_variance", "1", Better::kLower),
                      role + " unexplained variance", Shown::kNowhere)};
  }

 private:
  bool keys_;
  ByHead sums_, variance_;
  std::map<std::pair<int, int>, std::vector<double>> channels_;
  std::vector<double> position_error_, position_energy_;
};

struct KeyNmse : Nmse {
  KeyNmse() : Nmse(true) {}
};
struct ValueNmse : Nmse {
  ValueNmse() : Nmse(false) {}
};

MetricInfo info_of(const std::string& what) {
  return {what + "_nmse",
          what + " reconstruction error",
          "1",
          "sum |x - x^|^2 / sum |x|^2 over coded tokens; also over sum |x - mean|^2",
          "common",
          "a cheap metric: it can rank codecs the wrong way round; read it beside attention.softmax_kl",
          Better::kLower};
}

}  // namespace

VQKV_DEFINE_METRIC(key_nmse, KeyNmse, info_of("key"))
VQKV_DEFINE_METRIC(value_nmse, ValueNmse, info_of("value"))

}  // namespace vqkv
