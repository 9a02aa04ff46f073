// Ratios summed per (layer, KV head, document): the aggregation that the sweep's metrics share.
#pragma once
#include <fmt/format.h>

#include <cmath>
#include <map>
#include <set>
#include <string>
#include <tuple>
#include <utility>

#include "core/error.h"
#include "metric/metric.h"
#include "metric/statistics.h"

namespace vqkv {

// value = mean over heads of (sum of numerators / sum of denominators over the head's documents). The error is over
// documents: each document gives one mean over heads. `root` takes a square root of each ratio (RMS).
class ByHead {
 public:
  void add(const FidelitySample& s, double numerator, double denominator) {
    auto& cell = cells_[{s.layer, s.kv_head, s.document}];
    cell.first += numerator;
    cell.second += denominator;
  }

  bool empty() const { return cells_.empty(); }

  Measurement measure(std::string tag, std::string unit, Better better, bool root = false) const {
    const auto ratio = [&](double n, double d) { return d > 0 ? (root ? std::sqrt(n / d) : n / d) : std::nan(""); };
    std::map<std::pair<int, int>, std::pair<double, double>> heads;
    std::map<int, std::pair<double, double>> documents;
    int layers = 0, kv_heads = 0;
    for (const auto& [key, cell] : cells_) {
      const auto [layer, head, document] = key;
      // A mean over the other heads would look like a good score.
      if (!std::isfinite(cell.first) || !std::isfinite(cell.second) ||
          (cell.second > 0 && !std::isfinite(ratio(cell.first, cell.second))))
        fail_data(fmt::format("{}: layer {}, KV head {}, document {} gives {} over {}", tag, layer, head, document,
                              cell.first, cell.second));
      auto& h = heads[{layer, head}];
      h.first += cell.first;
      h.second += cell.second;
      if (cell.second > 0) {
        auto& d = documents[document];
        d.first += ratio(cell.first, cell.second);
        d.second += 1;
      }
      layers = std::max(layers, layer + 1);
      kv_heads = std::max(kv_heads, head + 1);
    }
    Measurement m;
    m.tag = std::move(tag);
    m.unit = std::move(unit);
    m.better = better;
    Detail map{
        "layer,kv_head", {layers, kv_heads}, std::vector<double>(static_cast<size_t>(layers * kv_heads), std::nan(""))};
    double sum = 0, count = 0;
    for (const auto& [key, h] : heads) {
      const double r = ratio(h.first, h.second);  // NaN: nothing was measured
      map.values[static_cast<size_t>(key.first * kv_heads + key.second)] = r;
      if (std::isfinite(r)) sum += r, count += 1;
    }
    m.value = count > 0 ? sum / count : std::nan("");
    for (const auto& [id, d] : documents) m.per_document.push_back(d.first / d.second);
    m.n = static_cast<int64_t>(m.per_document.size());
    m.stderr_ = mean_error(m.per_document).error;
    m.details.push_back(std::move(map));
    return m;
  }

 private:
  std::map<std::tuple<int, int, int>, std::pair<double, double>> cells_;
};

// What a metric file ends with.
#define VQKV_DEFINE_METRIC(name, MetricType, info)                                                     \
  const ::vqkv::MetricKind& vqkv_metric_##name() {                                                     \
    struct Kind final : ::vqkv::MetricKind {                                                           \
      ::vqkv::MetricInfo describe() const override { return info; }                                    \
      std::unique_ptr<::vqkv::Metric> make() const override { return std::make_unique<MetricType>(); } \
    };                                                                                                 \
    static const Kind kind;                                                                            \
    return kind;                                                                                       \
  }

}  // namespace vqkv
