// Which rows of a trace a cell trains on and measures, and their reading in a codec's domain.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "codec/build.h"
#include "core/rope.h"
#include "experiment/cell_config.h"
#include "io/trace.h"

namespace vqkv {

// The layers and KV heads of a cell. Inside a scope they are numbered from 0; `layers` and `heads` give the trace's
// own.
struct Scope {
  CacheShape shape;
  std::vector<int> layers, heads;
  bool subsampled = false;
};
Scope scope_of(const CellConfig& config, const CacheShape& full);
// The units of `plan` (resolved against the full shape) that lie in the scope, renumbered. `skip` says when the chosen
// heads cut a unit.
CodecPlan plan_in_scope(const CodecPlan& plan, const Scope& scope);

// A sample of the queries is enough for what codecs do with them, and bounds memory on long traces.
inline constexpr int64_t kMaxTrainQueries = 8192;

// One window of a select or report document.
struct EvalWindow {
  TraceWindow window;
  bool report = false;
  TokenRun images;                      // its image tokens; empty where the policy asks for none
  std::vector<int32_t> position;        // (tokens), as recorded
  std::vector<int64_t> query_row;       // rows of the trace's query axis in use
  std::vector<int64_t> query_position;  // the same as token index within the window
};

class TraceRows final : public TrainSource {
 public:
  TraceRows(const TraceReader& reader, const CellConfig& config);

  const TraceReader& reader() const { return reader_; }
  const Scope& scope() const { return scope_; }
  const CellConfig& config() const { return config_; }
  // The cell's policy in a window. Without one: where the image tokens are that it codes, at the mean of those of the
  // report documents (none in a window without any).
  CachePolicy policy(const EvalWindow& w) const { return policy_.of_text(w.images); }
  CachePolicy policy() const;
  // Why no window of the report documents has a coded token, or "". codecs: null for rows from elsewhere.
  std::string codes_nothing(const CodecSet* codecs = nullptr) const;
  const std::vector<EvalWindow>& windows() const { return windows_; }
  int64_t train_rows() const { return static_cast<int64_t>(train_.size()); }
  int64_t tokens(bool report) const;
  int64_t queries(bool report) const;
  // Positions of select and report rows lie beyond those trained on.
  bool extrapolated() const { return extrapolated_; }

  // Rows of the train documents in order, without each window's sinks (they are never coded) or, where images alone
  // are, its text, evenly thinned to train_tokens. Rounded to exact_dtype, as a cache hands them to a codec.
  TrainData unit(const UnitShape& unit, const TrainNeeds& needs) const override;
  std::string place(const UnitShape& unit) const override;

  // kBadData when a value read is not finite. Keys of one head of a window before RoPE, values, and queries after RoPE
  // ((queries * group, head_dim), query-major).
  Matrix<float> keys(int layer, int head, const EvalWindow& w) const;
  Matrix<float> values(int layer, int head, const EvalWindow& w) const;
  Matrix<float> queries(int layer, int head, const EvalWindow& w) const;
  // Those of the window's first tokens, whether in use or not, (n * group, head_dim) after or before RoPE. kBadData
  // where the trace recorded only some of them.
  void first_queries(int layer, int head, const EvalWindow& w, bool rotated, MutMatrix out) const;
  // W_O columns of a KV head's query heads, or empty.
  Matrix<float> output_weight(int layer, int first_head, int heads) const;
  const RopeTable& rope() const { return rope_; }
  // kBadData, with the place: what a cache holds of the window exactly, (tokens, head_dim), leaves exact_dtype.
  void check_exact(Role role, int layer, int head, const EvalWindow& w, ConstMatrix x) const;
  // Where a value of a head of the scope stands, for messages; `row` of the trace.
  std::string place(Role role, int layer, int head, int64_t row, int64_t channel) const;

 private:
  struct TrainWindow {
    TraceWindow window;
    std::vector<int64_t> rows;  // within the window
  };
  // As recorded; layer and KV head of the scope, query head of the trace.
  void read_keys(int layer, int head, const TraceWindow& w, MutMatrix out) const;
  void read_values(int layer, int head, const TraceWindow& w, MutMatrix out) const;
  void read_queries(int layer, int q_head, int64_t first, int64_t count, MutMatrix out) const;
  // Parts of unit().
  void add_rows(const UnitShape& unit, const TrainNeeds& needs, TrainData& t) const;
  void add_gradients(const UnitShape& unit, TrainData& t) const;
  void add_queries(const UnitShape& unit, TrainData& t) const;
  void add_moments(const UnitShape& unit, TrainData& t) const;

  const TraceReader& reader_;
  CellConfig config_;
  CachePolicy policy_;
  Scope scope_;
  RopeTable rope_;
  std::vector<EvalWindow> windows_;
  std::vector<TrainWindow> train_windows_;
  std::vector<int64_t> train_;
  bool extrapolated_ = false;
};

}  // namespace vqkv
