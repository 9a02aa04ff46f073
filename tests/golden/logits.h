// Logits of another engine, and ours of the same tokens.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "attention/session_cpu.h"
#include "io/atomic_file.h"
#include "model/runtime.h"
#include "support/catch.h"

namespace vqkv::test {

inline const std::string kTiny = std::string(VQKV_SOURCE_DIR) + "/tests/golden/tiny/";
inline constexpr int64_t kGoldenTokens = 80;

struct Golden {
  std::vector<int32_t> ids;
  Matrix<float> logits;
};

// PATH.logits.bin: the tokens, then their logits.
inline Golden read_golden(const std::string& path, int64_t vocab) {
  const std::string bytes = read_file(path + ".logits.bin");
  Golden g;
  g.ids.resize(kGoldenTokens);
  g.logits = Matrix<float>(kGoldenTokens, vocab);
  const size_t id_bytes = kGoldenTokens * sizeof(int32_t), logit_bytes = g.logits.storage.size() * sizeof(float);
  REQUIRE(bytes.size() == id_bytes + logit_bytes);
  std::memcpy(g.ids.data(), bytes.data(), id_bytes);
  std::memcpy(g.logits.data(), bytes.data() + id_bytes, logit_bytes);
  return g;
}

inline Matrix<float> logits_of(ModelRuntime& model, const std::vector<int32_t>& ids, int64_t block,
                               ModelTap* tap = nullptr) {
  CompressedCache cache(exact_codec_set(model.facts().cache_shape()), CachePolicy::exact(DType::kF32));
  const auto backend = make_attention_backend("cpu-reconstruct");
  KvSessionCpu kv(cache, *backend);
  Matrix<float> out(static_cast<int64_t>(ids.size()), model.facts().vocab);
  for (int64_t first = 0; first < out.rows; first += block) {
    const int64_t n = std::min(block, out.rows - first);
    model.forward(std::span(ids).subspan(static_cast<size_t>(first), static_cast<size_t>(n)), kv, LogitRows::kAll,
                  out.view().slice_rows(first, n), Visibility::kReplay, tap);
  }
  return out;
}

inline double largest_difference(const Matrix<float>& a, const Matrix<float>& b) {
  REQUIRE(a.storage.size() == b.storage.size());
  double worst = 0;
  for (size_t i = 0; i < a.storage.size(); ++i) {
    REQUIRE(std::isfinite(a.storage[i]));
    worst = std::max(worst, static_cast<double>(std::abs(a.storage[i] - b.storage[i])));
  }
  return worst;
}

inline double spread(const Matrix<float>& a) {
  double sum = 0;
  for (const float v : a.storage) sum += static_cast<double>(v) * v;
  return std::sqrt(sum / static_cast<double>(a.storage.size()));
}

}  // namespace vqkv::test
