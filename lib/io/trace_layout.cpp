#include "io/trace_layout.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "core/error.h"

namespace vqkv {

int64_t TraceDataset::count() const {
  size_t n = 1;
  for (const int64_t d : dims) n = checked_mul(n, static_cast<size_t>(d), name.c_str());
  return static_cast<int64_t>(n);
}

int64_t TraceDataset::blocks() const {
  int64_t n = 1;
  for (int i = 0; i < hash_lead; ++i) n *= dims[static_cast<size_t>(i)];
  return n;
}

int64_t TraceDataset::stored_bytes() const {
  size_t n = hdf5_type_size(type);
  for (size_t i = 0; i < dims.size(); ++i) {
    const int64_t c = chunk.empty() ? 1 : chunk[i];
    n = checked_mul(n, static_cast<size_t>((dims[i] + c - 1) / c * c), name.c_str());
  }
  return static_cast<int64_t>(n);
}

Hdf5Type stored_type(DType t) {
  switch (t) {
    case DType::kBF16:
      return Hdf5Type::kBF16;
    case DType::kF16:
      return Hdf5Type::kF16;
    case DType::kF32:
      return Hdf5Type::kF32;
    default:
      fail_usage(fmt::format("a trace stores bf16, f16 or f32, not {}", dtype_name(t)));
  }
}

const char* squared_gradient_name(GradientOf of) {
  constexpr const char* kNames[] = {"key_gradient2", "rotated_key_gradient2", "value_gradient2"};
  return kNames[static_cast<size_t>(of)];
}

const char* gradient_moment_name(GradientOf of) {
  constexpr const char* kNames[] = {"key_gradient_moment", "rotated_key_gradient_moment", "value_gradient_moment"};
  return kNames[static_cast<size_t>(of)];
}

std::vector<TraceDataset> trace_datasets(const TraceSizes& s, DType stored) {
  using enum Hdf5Type;
  const Hdf5Type t = stored_type(stored);
  const int64_t pairs = s.head_dim / 2;
  std::vector<TraceDataset> out;
  const auto coordinate = [&](const char* name, int64_t n, int lead = -1) {
    out.push_back({name, kI32, {n}, {}, {name}, lead});
  };
  coordinate("layer", s.layers, 0);  // the model's real layer numbers
  coordinate("kv_head", s.kv_heads);
  coordinate("q_head", s.q_heads);
  coordinate("channel", s.head_dim);
  coordinate("channel_b", s.head_dim);  // the second channel axis of a (d, d) matrix
  coordinate("pair", pairs);            // RoPE pair p = channels (p, p + d/2)
  coordinate("token", s.tokens);
  coordinate("query_token", s.queries, 0);  // absolute token of each recorded query
  coordinate("document", s.documents);
  if (s.hidden > 0) {
    coordinate("hidden", s.hidden);
    coordinate("attention_channel", s.q_heads * s.head_dim);
  }
  const auto data = [&](const char* name, Hdf5Type type, std::vector<int64_t> dims, std::vector<std::string> axes,
                        int lead, std::vector<int64_t> chunk = {}) {
    for (size_t i = 0; i < chunk.size(); ++i) chunk[i] = std::max<int64_t>(1, std::min(chunk[i], dims[i]));
    out.push_back({name, type, std::move(dims), std::move(chunk), std::move(axes), lead});
  };
  for (const char* name : {"token_id", "position", "doc", "window"}) data(name, kI32, {s.tokens}, {"token"}, 0);
  if (s.token_types) data("token_type", kI32, {s.tokens}, {"token"}, 0);
  data("moment_count", kI64, {s.documents}, {"document"}, 0);
  data("query_moment", kF64, {s.documents, s.layers, s.kv_heads, s.head_dim, s.head_dim},
       {"document", "layer", "kv_head", "channel", "channel_b"}, 0);
  data("query_pair_moment", kF64, {s.documents, s.layers, s.kv_heads, pairs}, {"document", "layer", "kv_head", "pair"},
       0);
  for (const char* name : {"received_mass", "received_mass2"})
    data(name, kF32, {s.layers, s.kv_heads, s.tokens}, {"layer", "kv_head", "token"}, 2, {1, 1, kTraceMassTokens});
  if (s.hidden > 0)
    data("output_weight", t, {s.layers, s.hidden, s.q_heads * s.head_dim}, {"layer", "hidden", "attention_channel"}, 1);
  for (const char* name : {"key", "value"})
    data(name, t, {s.layers, s.kv_heads, s.tokens, s.head_dim}, {"layer", "kv_head", "token", "channel"}, 2,
         {1, 1, kTraceChunkTokens, s.head_dim});
  data("query", t, {s.layers, s.q_heads, s.queries, s.head_dim}, {"layer", "q_head", "query_token", "channel"}, 2,
       {1, 1, kTraceChunkTokens, s.head_dim});
  if (!s.gradients) return out;
  // bf16 whatever the rest is stored as: squares need its range, and weights no more than its precision.
  for (const GradientOf of : kGradientsOf)
    data(squared_gradient_name(of), kBF16, {s.layers, s.kv_heads, s.tokens, s.head_dim},
         {"layer", "kv_head", "token", "channel"}, 2, {1, 1, kTraceChunkTokens, s.head_dim});
  for (const GradientOf of : kGradientsOf)
    data(gradient_moment_name(of), kF64, {s.documents, s.layers, s.kv_heads, s.head_dim, s.head_dim},
         {"document", "layer", "kv_head", "channel", "channel_b"}, 0);
  return out;
}

TraceHash::TraceHash(bool keys_pre_rope, const std::string& model_json) {
  const std::string header = fmt::format("{} {}\nkeys={}\nmodel={}\n", kTraceFormat, kTraceVersion,
                                         keys_pre_rope ? "pre_rope" : "post_rope", model_json);
  hash_.update(header.data(), header.size());
}

void TraceHash::dataset(const TraceDataset& d, const std::vector<std::string>& block_hashes) {
  VQKV_CHECK(d.hash_lead >= 0 && static_cast<int64_t>(block_hashes.size()) == d.blocks());
  std::string text = fmt::format("{} {} {}\n", d.name, hdf5_type_name(d.type), fmt::join(d.dims, "x"));
  for (const std::string& h : block_hashes) text += h + "\n";
  hash_.update(text.data(), text.size());
}

}  // namespace vqkv
