// Key and value reconstruction error, whole, per channel and per position. Keys are compared post-RoPE.
#include <algorithm>

#include "metric/by_head.h"

namespace vqkv {
namespace {

// Squared error over squared norm of the tokens that were coded for the last query of the window.
class Nmse : public Metric {
 public:
  explicit Nmse(bool keys) : keys_(keys) {}

  void add(const FidelitySample& s, const AttentionRows&) override {
    const ConstMatrix x = keys_ ? s.k : s.v, hat = keys_ ? s.k_hat : s.v_hat;
    const auto& ends = keys_ ? s.coded_end_k : s.coded_end_v;
    const int64_t begin = s.sinks, end = ends.empty() ? x.rows : *std::max_element(ends.begin(), ends.end());
    std::vector<double> error(static_cast<size_t>(x.cols)), energy(error.size());
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
    auto& channel = channels_[{s.layer, s.kv_head}];
    if (channel.empty()) channel.resize(static_cast<size_t>(2 * x.cols));
    for (int64_t c = 0; c < x.cols; ++c) {
      channel[static_cast<size_t>(c)] += error[static_cast<size_t>(c)];
      channel[static_cast<size_t>(x.cols + c)] += energy[static_cast<size_t>(c)];
    }
  }

  std::vector<Measurement> finish() override {
    Measurement m = sums_.measure(keys_ ? "key.nmse" : "value.nmse", "1", Better::kLower);
    if (!channels_.empty()) {
      const int64_t d = static_cast<int64_t>(channels_.begin()->second.size()) / 2;
      const int64_t layers = channels_.rbegin()->first.first + 1;
      int64_t heads = 0;
      for (const auto& [key, v] : channels_) heads = std::max<int64_t>(heads, key.second + 1);
      Detail by_channel{"layer,kv_head,channel", {layers, heads, d}, std::vector<double>(static_cast<size_t>(layers * heads * d), std::nan(""))};
      for (const auto& [key, v] : channels_)
        for (int64_t c = 0; c < d; ++c) {
          const double energy = v[static_cast<size_t>(d + c)];
          by_channel.values[static_cast<size_t>((key.first * heads + key.second) * d + c)] = energy > 0 ? v[static_cast<size_t>(c)] / energy : std::nan("");
        }
      m.details.push_back(std::move(by_channel));
    }
    Detail by_position{"position", {static_cast<int64_t>(position_error_.size())}, {}};
    for (size_t t = 0; t < position_error_.size(); ++t)
      by_position.values.push_back(position_energy_[t] > 0 ? position_error_[t] / position_energy_[t] : std::nan(""));
    m.details.push_back(std::move(by_position));
    return {m};
  }

 private:
  bool keys_;
  ByHead sums_;
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
  return {what + "_nmse", what + " reconstruction error", "1", "sum |x - x^|^2 / sum |x|^2 over coded tokens", "common",
          "a cheap metric: it can rank codecs the wrong way round; read it beside attention.softmax_kl", Better::kLower};
}

}  // namespace

VQKV_DEFINE_METRIC(key_nmse, KeyNmse, info_of("key"))
VQKV_DEFINE_METRIC(value_nmse, ValueNmse, info_of("value"))

}  // namespace vqkv
