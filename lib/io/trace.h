// Trace: what was recorded of a model's K, V and Q. Read-only, streamed by (layer, head, role). Layout of the file:
// docs/formats.md. Keys, values and queries are stored raw in 16 bits (or f32) and widened by us: HDF5 never converts.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/cache_shape.h"
#include "core/dtype.h"
#include "core/json.h"
#include "core/view.h"

namespace vqkv {

// Of what a recorded gradient is: keys before RoPE, the same keys after it, values.
enum class GradientOf { kKey, kRotatedKey, kValue };
inline constexpr GradientOf kGradientsOf[] = {GradientOf::kKey, GradientOf::kRotatedKey, GradientOf::kValue};

struct TraceInfo {
  CacheShape shape;
  int hidden = 0;               // rows of W_O, 0 when it was not recorded
  DType stored = DType::kBF16;  // of key, value, query
  bool keys_pre_rope = true;
  // The loss whose gradients were recorded, summed over a window: "next-token" (-log p of the text's own next token) or
  // "sampled" (of one drawn from the model). Empty: no gradients.
  std::string gradients;
  // Names of the types of tokens, in the order of their numbers; the first is "text". Empty: types were not recorded,
  // and every token is text.
  std::vector<std::string> token_types;
  std::vector<int32_t> layer_index;  // (layers): the model's real layer numbers
  std::string model_name, model_hash;
  Json model;                // facts of the model as JSON
  Json provenance;           // tool, command, time
  std::string content_hash;  // XXH3-128 over logical values in a fixed order; set by the writer, checked by verify
};

// Consecutive tokens that attend to each other: one window of one document. Positions restart at 0 in each.
struct TraceWindow {
  int32_t document = 0;
  int64_t first_token = 0;  // index into the token axis
  int64_t tokens = 0;
  int64_t first_query = 0;  // index into the query axis
  int64_t queries = 0;
};

struct TraceDocument {
  int32_t id = 0;
  std::string name;
  int64_t tokens = 0;
};

// Everything of one window, handed to the writer at once.
struct TraceWindowData {
  int32_t document = 0;
  std::vector<int32_t> token_id;     // (n)
  std::vector<int32_t> position;     // (n)
  std::vector<int32_t> token_type;   // (n), numbers of info.token_types; with those alone
  std::vector<int32_t> query_token;  // (m): token of each recorded query, relative to the window, ascending
  // Per layer l: keys (n, kv_heads*d) pre-RoPE, values (n, kv_heads*d), queries (m, q_heads*d) PRE-RoPE.
  std::vector<Matrix<float>> key, value, query;
  // Sums over all positions of this window, per layer: query_moment (kv_heads, d, d) post-RoPE summed over the group's
  // heads; query_pair_moment (kv_heads, d/2) pre-RoPE sum of |q_p|^2; received mass (kv_heads, n): sum over recorded
  // queries and the group's heads of p and p^2.
  std::vector<std::vector<double>> query_moment, query_pair_moment;
  std::vector<std::vector<float>> received_mass, received_mass2;
  // With info.gradients, by GradientOf and layer: squares of the gradients (n, kv_heads*d), and their sums of g g^T
  // over all positions (kv_heads, d, d).
  std::vector<Matrix<float>> squared_gradient[3];
  std::vector<std::vector<double>> gradient_moment[3];
};

class TraceWriter {
 public:
  // Writes PATH.partial; finish() sets complete=1 and renames. Without finish() the partial file is removed.
  TraceWriter(const std::string& path, TraceInfo info, std::vector<std::string> document_names, int64_t max_tokens,
              int64_t max_queries);
  ~TraceWriter();
  void add(const TraceWindowData& window);
  const std::string& records_gradients() const;    // info.gradients: every window's are due where it names a loss
  bool records_output_weight() const;              // info.hidden > 0: every layer's is due before finish()
  void output_weight(int layer, ConstMatrix w_o);  // (hidden, q_heads*d)
  void finish();
  double hash_seconds() const;  // the content hash is timed apart from writing
  double write_seconds() const;
  int64_t bytes_written() const;

  static int64_t estimate_bytes(const TraceInfo& info, int64_t tokens, int64_t queries, int64_t documents);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

class TraceReader {
 public:
  // Refuses (kBadData) what is incomplete, of another version, or does not satisfy the schema. The container is first
  // opened in a forked probe with limits, since libhdf5 1.10 itself crashes on some hostile files.
  explicit TraceReader(const std::string& path);
  ~TraceReader();
  const TraceInfo& info() const;
  const std::string& path() const;
  int64_t tokens() const;
  int64_t queries() const;
  const std::vector<TraceDocument>& documents() const;
  const std::vector<TraceWindow>& windows() const;
  const std::vector<int32_t>& token_id() const;     // (tokens)
  const std::vector<int32_t>& position() const;     // (tokens)
  const std::vector<int32_t>& document_of() const;  // (tokens)
  const std::vector<int32_t>& query_token() const;  // (queries): absolute token index
  // (tokens): numbers of info().token_types; empty where they are.
  const std::vector<int32_t>& token_type() const;

  // out is (count, head_dim). Keys as stored (info().keys_pre_rope). Thread-safe (one lock: libhdf5 serialises anyway).
  void key(int layer, int kv_head, int64_t first, int64_t count, MutMatrix out) const;
  void value(int layer, int kv_head, int64_t first, int64_t count, MutMatrix out) const;
  void query(int layer, int q_head, int64_t first, int64_t count, MutMatrix out) const;  // pre-RoPE

  // Sums over all positions of one document and the group's query heads: (d, d) and (d/2). moment_count is the number
  // of query vectors in each sum: tokens of the document times group().
  Matrix<double> query_moment(int layer, int kv_head, int document) const;
  std::vector<double> query_pair_moment(int layer, int kv_head, int document) const;
  int64_t moment_count(int document) const;
  // (count) sums over recorded queries and the group's heads.
  std::vector<float> received_mass(int layer, int kv_head, int64_t first, int64_t count) const;
  std::vector<float> received_mass2(int layer, int kv_head, int64_t first, int64_t count) const;
  bool has_output_weight() const;
  Matrix<float> output_weight(int layer) const;  // (hidden, q_heads*d)

  bool has_gradients() const;  // info().gradients names their loss
  // out is (count, head_dim): (dL/dx)^2 of every value; kBadData where one is negative or not finite.
  void squared_gradient(GradientOf of, int layer, int kv_head, int64_t first, int64_t count, MutMatrix out) const;
  // (d, d): sum of g g^T over all positions of one document.
  Matrix<double> gradient_moment(GradientOf of, int layer, int kv_head, int document) const;

  // Recomputes the content hash, looks for NaN and infinities. Returns the problems found.
  std::vector<std::string> verify() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace vqkv
