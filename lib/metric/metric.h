// Metrics of a sweep: one file each, registered by one line in metrics.inc.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "codec/plan.h"
#include "codec/query_form.h"
#include "core/view.h"
#include "metric/measurement.h"

namespace vqkv {

// Scores and probabilities of a sample's queries, exact and with the coded tokens decoded. Rows are query * group + g.
struct AttentionRows {
  Matrix<float> s, s_hat;       // scaled logits; only the first tokens[row] entries of a row mean anything
  Matrix<float> p, p_hat;       // probabilities, zero beyond the causal edge
  std::vector<int64_t> tokens;  // causal length of a row
  std::vector<int64_t> coded_begin, coded_end;  // coded keys of a row
};

// One (layer, KV head, window) of a select or report document: exact and decoded, keys POST-RoPE, all (tokens,
// head_dim). A metric instance sees the samples of one role of documents, ordered by (layer, KV head, window).
struct FidelitySample {
  int layer = 0, kv_head = 0, document = 0;
  ConstMatrix k, k_hat, v, v_hat;
  ConstMatrix q;  // (queries * group, head_dim) post-RoPE, query-major: row = query * group + g
  // Rows [sinks, coded_last_k) of k_hat and [sinks, coded_last_v) of v_hat came from the codec; the others equal k and
  // v (sinks, and a tail shorter than a codec block). Reconstruction metrics read the coded rows only.
  int64_t coded_last_k = 0, coded_last_v = 0;
  int group = 1;
  std::vector<int64_t> query_position;  // (queries): token index within the window
  // For query i, tokens [sinks, coded_end[i]) are coded (k_hat, v_hat), the rest exact.
  int64_t sinks = 0;
  std::vector<int64_t> coded_end_k, coded_end_v;
  bool dropped = false;  // "coded" tokens are gone: no weight falls on them
  ScoreMap score;        // of what the coded keys give
  CodedQueries query;    // what q is where it meets coded keys
  float score_scale = 0;
  ConstMatrix w_o;  // (hidden, group * head_dim) slice for this KV head's query heads, or empty
  // Codes of the whole unit for entropy metrics: set on the first head of a unit alone, so that each is counted once.
  const std::vector<std::vector<uint16_t>>* key_codes = nullptr;  // fields, as CodeBlock::fields
  const std::vector<std::vector<uint16_t>>* value_codes = nullptr;
  const CodeLayout* key_layout = nullptr;
  const CodeLayout* value_layout = nullptr;

  // Shared by the metrics that need them, which run side by side: whoever makes the sample builds them before, in the
  // memory of an earlier sample's where it has some. kBadData: a logit is not finite.
  void build_rows(std::shared_ptr<AttentionRows> room = std::make_shared<AttentionRows>());
  const AttentionRows& rows() const;

 private:
  std::shared_ptr<const AttentionRows> rows_;
};

class Metric {
 public:
  virtual ~Metric() = default;
  virtual void add(const FidelitySample& sample) = 0;  // called serially, in a fixed order
  virtual std::vector<Measurement> finish() = 0;
};

struct MetricInfo {
  std::string name, title, unit, formula, source, caveat;
  Better better = Better::kLower;
  bool of_dropped = false;  // also means something where tokens are dropped instead of coded
  bool of_codes = false;    // counts codes: nothing where decoded rows alone are known
  int version = 1;          // rises when the same rows give another number: part of a cell's identity
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
