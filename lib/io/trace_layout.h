// One table describes the datasets of a trace: the writer creates them from it, the reader holds a file to it, the size
// estimate sums it, and the content hash walks it. docs/formats.md shows it to people.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "core/hash.h"
#include "io/hdf5.h"
#include "io/trace.h"

namespace vqkv {

inline constexpr char kTraceFormat[] = "vqkv-trace";
inline constexpr int64_t kTraceVersion = 1;
inline constexpr int64_t kTraceChunkTokens = 1024;  // of key, value, query: one head's chunk is one contiguous read
inline constexpr int64_t kTraceMaxTokens = INT32_MAX;
inline constexpr int64_t kTraceMassTokens = 8192;  // of received_mass: 32 KiB chunks

struct TraceSizes {
  int64_t layers = 0, q_heads = 0, kv_heads = 0, head_dim = 0, hidden = 0;
  int64_t tokens = 0, queries = 0, documents = 0;
  bool gradients = false, token_types = false;
};

struct TraceDataset {
  std::string name;
  Hdf5Type type;
  std::vector<int64_t> dims, chunk;  // chunk empty: contiguous
  std::vector<std::string> axes;     // names of the coordinates, one a dimension
  int hash_lead = -1;                // leading dimensions that make separate hash blocks; -1: not hashed (an index)
  bool is_coordinate() const { return axes.size() == 1 && axes[0] == name; }
  int64_t count() const;
  int64_t blocks() const;        // hash blocks
  int64_t stored_bytes() const;  // whole chunks
};

Hdf5Type stored_type(DType t);  // bf16, f16, f32; kUsage otherwise
// Datasets of what a gradient is of: its squares, and sums of g g^T.
const char* squared_gradient_name(GradientOf of);
const char* gradient_moment_name(GradientOf of);
// Coordinates first (each is the scale of the axis of its name), then data. output_weight only with hidden > 0,
// gradients and token_type only where the sizes say so.
std::vector<TraceDataset> trace_datasets(const TraceSizes& sizes, DType stored);

// The content hash: XXH3-128 over a text of one header, and per hashed dataset its name, type, dims and the XXH3-128 of
// each block's bytes. Values in a fixed order, so re-chunking a file keeps its hash.
class TraceHash {
 public:
  TraceHash(bool keys_pre_rope, const std::string& model_json);
  void dataset(const TraceDataset& d, const std::vector<std::string>& block_hashes);
  std::string hex() const { return hash_.hex(); }

 private:
  ContentHash hash_;
};

}  // namespace vqkv
