// One measured number, self-describing: printers and tools need not know the metric.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "core/json_fwd.h"

namespace vqkv {

enum class Better { kLower, kHigher, kNeither };

// What of a measurement stands in tables for people. JSON and `--by` know all of them.
enum class Shown { kNowhere, kValue, kWithError };

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
  bool exact = false;  // counted, not sampled
  std::string title;   // heading of its column; empty: the tag
  std::string group;   // of columns that are asked for together: "kld", "ppl"; empty: always
  int digits = 4;      // significant digits in tables
  Shown shown = Shown::kWithError;
  std::vector<double> per_document;  // values the interval comes from; paired comparisons need them
  std::vector<Detail> details;
  const std::string& heading() const { return title.empty() ? tag : title; }
};
// `m` with what tables say of it.
Measurement titled(Measurement m, std::string title, Shown shown = Shown::kWithError, int digits = 4);

Json to_json(const Measurement& m);
// Its inverse, without details and values by document, which are large and which no table needs. kBadData led by
// `where` for a field that is missing or of another kind.
Measurement measurement_head_from_json(const Json& j, const std::string& where = "a measurement");

// One column of a table of measurements, as the measurements ask for it.
struct MeasureColumn {
  std::string tag, title, group;
  int digits = 4;
  bool error = false;  // any row has one to show
};
// Adds the column of `m`, unless it stands nowhere or is there already. The one source of what tables print.
void add_column(std::vector<MeasureColumn>& columns, const Measurement& m);
// "0.01234", "–" for what is not finite.
std::string measure_text(double value, int digits);

}  // namespace vqkv
