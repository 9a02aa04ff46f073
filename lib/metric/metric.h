// Metrics of a sweep: one file each, registered by one line in metrics.inc.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "core/view.h"
#include "metric/measurement.h"

namespace vqkv {

// The integer fields of a coded window, (tokens or blocks, slots) each.
struct CodeFields {
  std::vector<const std::vector<uint16_t>*> fields;
  std::vector<int> slots, bits;
};

// One (layer, KV head, window) of a report document: exact and decoded, keys POST-RoPE (and pre-RoPE for the
// reconstruction metrics), all (tokens, head_dim).
struct FidelitySample {
  int layer = 0, kv_head = 0, document = 0;
  ConstMatrix k, k_hat, v, v_hat;         // post-RoPE keys
  ConstMatrix q;                          // (queries * group, head_dim) post-RoPE, query-major: row = query * group + g
  int group = 1;
  std::vector<int64_t> query_position;    // (queries): token index within the window
  // For query i, tokens [sinks, coded_end[i]) are coded (k_hat, v_hat), the rest exact.
  int64_t sinks = 0;
  std::vector<int64_t> coded_end_k, coded_end_v;
  float score_scale = 0;
  ConstMatrix w_o;                        // (hidden, group * head_dim) slice for this KV head's query heads, or empty
  const CodeFields* key_codes = nullptr;  // of the unit that holds the head
  const CodeFields* value_codes = nullptr;
};

// Scores and probabilities of a sample's queries, exact and with the coded tokens decoded. Rows are query * group + g.
struct AttentionRows {
  Matrix<float> s, s_hat;                 // scaled logits; only the first tokens[row] entries of a row mean anything
  Matrix<float> p, p_hat;                 // probabilities, zero beyond the causal edge
  std::vector<int64_t> tokens;            // causal length of a row
  std::vector<int64_t> coded_begin, coded_end;  // coded keys of a row
};
AttentionRows attention_rows(const FidelitySample& sample);

class Metric {
 public:
  virtual ~Metric() = default;
  // Called serially, in a fixed order. `rows` is computed once a sample and shared by the metrics that need it.
  virtual void add(const FidelitySample& sample, const AttentionRows& rows) = 0;
  virtual std::vector<Measurement> finish() = 0;
};

struct MetricInfo {
  std::string name, title, unit, formula, source, caveat;
  Better better = Better::kLower;
};

class MetricKind {
 public:
  virtual ~MetricKind() = default;
  virtual MetricInfo describe() const = 0;
  virtual std::unique_ptr<Metric> make() const = 0;
};

const std::vector<const MetricKind*>& all_metrics();
const MetricKind& find_metric(const std::string& name);

}  // namespace vqkv
