// One measured number, self-describing: printers and tools need not know the metric.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "core/json_fwd.h"

namespace vqkv {

enum class Better { kLower, kHigher, kNeither };

// A breakdown of a value along an axis: heat maps and curves of the report.
struct Detail {
  std::string axis;  // "layer,kv_head" | "layer,kv_head,channel" | "position"
  std::vector<int64_t> shape;
  std::vector<double> values;  // row-major; NaN where nothing was measured
};

struct Measurement {
  std::string tag;  // hierarchical: "attention.softmax_kl", "key.nmse", "bytes.codes"
  double value = 0;
  std::string unit;    // "nats", "1", "bytes", "bits/value", "s", "tokens/s"
  double stderr_ = 0;  // standard error over `n` documents or windows; 0 when exact
  int64_t n = 0;       // independent samples behind the value
  Better better = Better::kLower;
  bool exact = false;                // counted, not sampled
  std::vector<double> per_document;  // values the interval comes from; paired comparisons need them
  std::vector<Detail> details;
};

Json to_json(const Measurement& m);
Measurement measurement_from_json(const Json& j);

}  // namespace vqkv
