// Small traces with known values, for tests of the writer, the reader and what reads traces.
#pragma once
#include <unistd.h>
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "core/rng.h"
#include "io/trace.h"

namespace vqkv {

struct TempDir {
  std::filesystem::path path;
  explicit TempDir(const std::string& name)
      : path(std::filesystem::temp_directory_path() / ("vqkv-" + name + "-" + std::to_string(getpid()))) {
    std::filesystem::remove_all(path);
    std::filesystem::create_directories(path);
  }
  ~TempDir() { std::filesystem::remove_all(path); }
  std::string operator/(const std::string& name) const { return (path / name).string(); }
};

inline TraceInfo trace_info(DType stored, int hidden = 10, int layers = 2, int kv_heads = 2, int q_heads = 4,
                            int head_dim = 8) {
  TraceInfo info;
  info.shape.layers = layers;
  info.shape.kv_heads = kv_heads;
  info.shape.q_heads = q_heads;
  info.shape.head_dim = head_dim;
  info.shape.rope = RopeFacts::plain(head_dim, head_dim, 10000.0);
  info.shape.score_scale = 0.35355339f;
  info.hidden = hidden;
  info.stored = stored;
  info.model_name = "random";
  info.model_hash = std::string(64, 'a');
  info.model = {{"architecture", "test"}};
  info.provenance = {{"tool", "test"}};
  return info;
}

inline Matrix<float> random_matrix(Rng& rng, int64_t rows, int64_t cols) {
  Matrix<float> m(rows, cols);
  for (auto& v : m.storage) v = static_cast<float>(rng.normal() * 3.0);
  return m;
}

inline TraceWindowData trace_window(const TraceInfo& info, int32_t document, int64_t n,
                                    std::vector<int32_t> query_token, uint64_t seed) {
  Rng rng(seed);
  const CacheShape& s = info.shape;
  TraceWindowData w;
  w.document = document;
  w.query_token = std::move(query_token);
  for (int64_t t = 0; t < n; ++t) {
    w.token_id.push_back(static_cast<int32_t>(rng.below(1000)));
    w.position.push_back(static_cast<int32_t>(t));
    if (!info.token_types.empty()) w.token_type.push_back(static_cast<int32_t>(rng.below(info.token_types.size())));
  }
  const auto m = static_cast<int64_t>(w.query_token.size());
  for (int l = 0; l < s.layers; ++l) {
    w.key.push_back(random_matrix(rng, n, s.kv_heads * s.head_dim));
    w.value.push_back(random_matrix(rng, n, s.kv_heads * s.head_dim));
    w.query.push_back(random_matrix(rng, m, s.q_heads * s.head_dim));
    const auto doubles = [&](int64_t count) {
      std::vector<double> v(static_cast<size_t>(count));
      for (auto& x : v) x = rng.normal();
      return v;
    };
    const auto floats = [&](int64_t count) {
      std::vector<float> v(static_cast<size_t>(count));
      for (auto& x : v) x = static_cast<float>(rng.uniform());
      return v;
    };
    w.query_moment.push_back(doubles(int64_t{s.kv_heads} * s.head_dim * s.head_dim));
    w.query_pair_moment.push_back(doubles(int64_t{s.kv_heads} * s.head_dim / 2));
    w.received_mass.push_back(floats(s.kv_heads * n));
    w.received_mass2.push_back(floats(s.kv_heads * n));
    for (size_t of = 0; !info.gradients.empty() && of < std::size(kGradientsOf); ++of) {
      w.squared_gradient[of].push_back(random_matrix(rng, n, s.kv_heads * s.head_dim));
      for (auto& v : w.squared_gradient[of].back().storage) v *= v * 1e-9f;  // below what f16 holds
      w.gradient_moment[of].push_back(doubles(int64_t{s.kv_heads} * s.head_dim * s.head_dim));
    }
  }
  return w;
}

struct WrittenTrace {
  TraceInfo info;
  std::vector<TraceWindowData> windows;
  std::vector<Matrix<float>> output_weight;
};

// Two documents: windows of 1500, 700 and 1024 tokens, so that chunk tails, whole chunks and a chunk that spans two
// windows all occur; 2000 spare tokens of capacity, so that the datasets shrink.
inline WrittenTrace write_trace(const std::string& path, DType stored, int hidden = 10, int64_t spare = 2000,
                                const std::string& gradients = "") {
  WrittenTrace out{trace_info(stored, hidden), {}, {}};
  out.info.gradients = gradients;
  TraceWriter writer(path, out.info, {"first.txt", "second.txt"}, 3224 + spare, 9 + spare);
  out.windows.push_back(trace_window(out.info, 0, 1500, {0, 16, 1499}, 1));
  out.windows.push_back(trace_window(out.info, 0, 700, {3, 699}, 2));
  out.windows.push_back(trace_window(out.info, 1, 1024, {0, 1, 2, 1023}, 3));
  for (const auto& w : out.windows) writer.add(w);
  Rng rng(9);
  for (int l = 0; hidden > 0 && l < out.info.shape.layers; ++l) {
    out.output_weight.push_back(random_matrix(rng, hidden, out.info.shape.q_heads * out.info.shape.head_dim));
    writer.output_weight(l, out.output_weight.back());
  }
  writer.finish();
  return out;
}

}  // namespace vqkv
