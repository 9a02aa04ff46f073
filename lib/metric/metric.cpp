#include "metric/metric.h"

#include <fmt/format.h>

#include "core/error.h"

namespace vqkv {

#define VQKV_METRIC(name) const MetricKind& vqkv_metric_##name();
#include "metric/metrics.inc"
#undef VQKV_METRIC

const std::vector<const MetricKind*>& all_metrics() {
  static const std::vector<const MetricKind*> metrics = {
#define VQKV_METRIC(name) &vqkv_metric_##name(),
#include "metric/metrics.inc"
#undef VQKV_METRIC
  };
  return metrics;
}

const MetricKind& find_metric(const std::string& name) {
  std::vector<std::string> names;
  for (const MetricKind* m : all_metrics()) {
    names.push_back(m->describe().name);
    if (names.back() == name) return *m;
  }
  const std::string near = nearest_name(name, names);
  fail_usage(fmt::format("unknown metric '{}'{}; known: {}", name, near.empty() ? "" : fmt::format(" (did you mean '{}'?)", near),
                         fmt::join(names, ", ")));
}

}  // namespace vqkv
