// One measured number, self-describing: printers and tools need not know the metric.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "core/json_fwd.h"

namespace vqkv {

enum class Better { kLower, kHigher, kNeither };

struct Measurement {
  std::string tag;       // hierarchical: "attention.softmax_kl", "key.nmse", "bytes.codes"
  double value = 0;
  std::string unit;      // "nats", "1", "bytes", "bits/value", "s", "tokens/s"
  double stderr_ = 0;    // standard error over `n` documents or windows; 0 when exact
  int64_t n = 0;         // independent samples behind the value
  Better better = Better::kLower;
  bool exact = false;    // counted, not sampled
  std::vector<double> per_document;  // values the interval comes from; paired comparisons need them
};

Json to_json(const Measurement& m);
Measurement measurement_from_json(const Json& j);

}  // namespace vqkv
