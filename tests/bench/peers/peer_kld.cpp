// The full-vocabulary KL divergence between another engine's logits and ours.
//   llama_peer.py MODEL.F32.gguf logits --ids IDS.txt --context 1024 -o LOGITS.raw
//   peer_kld MODEL IDS.txt LOGITS.raw 1024
// IDS.txt: decimal token ids; LOGITS.raw: float32 (tokens, vocab), windows of CONTEXT tokens each from an empty cache.
// Prints one line of JSON: KL(peer || ours) in nats over every position (mean, largest), and how often the arg-max
// agrees.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <iostream>

#include "attention/session_cpu.h"
#include "core/json.h"
#include "model/runtime.h"

namespace vqkv {
namespace {

double log_sum(const float* logits, int64_t n) {
  const double most = *std::max_element(logits, logits + n);
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += std::exp(logits[i] - most);
  return most + std::log(sum);
}

int compare(const std::string& model_path, const std::string& ids_path, const std::string& logits_path,
            int64_t context) {
  if (context < 1) fail_usage(fmt::format("context is {}; allowed: 1 or more", context));
  const auto model = load_model(model_path);
  const int64_t vocab = model->facts().vocab;
  std::ifstream ids_file(ids_path);
  if (!ids_file) fail_data("can't open " + ids_path);
  std::vector<int32_t> ids;
  for (int32_t id; ids_file >> id;) ids.push_back(id);
  std::ifstream peer_file(logits_path, std::ios::binary);
  if (!peer_file) fail_data("can't open " + logits_path);

  const auto backend = make_attention_backend("cpu-reconstruct");
  const int64_t block = std::min<int64_t>(256, context), tokens = static_cast<int64_t>(ids.size());
  Matrix<float> ours(block, vocab), peer(block, vocab);
  double total = 0, largest = 0;
  int64_t same_top = 0;
  for (int64_t start = 0; start < tokens; start += context) {
    CompressedCache cache(exact_codec_set(model->facts().cache_shape()), CachePolicy::exact(DType::kF32));
    KvSessionCpu kv(cache, *backend);
    const int64_t end = std::min(tokens, start + context);
    for (int64_t first = start; first < end; first += block) {
      const int64_t n = std::min(block, end - first);
      peer_file.read(reinterpret_cast<char*>(peer.data()), n * vocab * static_cast<int64_t>(sizeof(float)));
      if (!peer_file)
        fail_data(fmt::format("{} ends before the logits of token {} of {}", logits_path, first + n, tokens));
      model->forward(std::span(ids).subspan(static_cast<size_t>(first), static_cast<size_t>(n)), kv, LogitRows::kAll,
                     ours.view().slice_rows(0, n));
      for (int64_t r = 0; r < n; ++r) {
        const float *a = peer.row(r), *b = ours.row(r);
        const double la = log_sum(a, vocab), lb = log_sum(b, vocab);
        double kld = 0;
        for (int64_t i = 0; i < vocab; ++i) kld += std::exp(a[i] - la) * ((a[i] - la) - (b[i] - lb));
        total += kld;
        largest = std::max(largest, kld);
        same_top += std::max_element(a, a + vocab) - a == std::max_element(b, b + vocab) - b;
      }
    }
  }
  const double n = static_cast<double>(std::max<int64_t>(tokens, 1));
  const Json result = {{"tokens", tokens},
                       {"context", context},
                       {"kld_mean", total / n},
                       {"kld_max", largest},
                       {"same_top", static_cast<double>(same_top) / n}};
  std::cout << result.dump() << "\n";
  return 0;
}

}  // namespace
}  // namespace vqkv

int main(int argc, char** argv) {
  if (argc != 5) {
    std::cerr << "usage: peer_kld MODEL IDS.txt LOGITS.raw CONTEXT\n";
    return 2;
  }
  try {
    return vqkv::compare(argv[1], argv[2], argv[3], std::atoll(argv[4]));
  } catch (const vqkv::Error& e) {
    std::cerr << "error: " << e.what() << "\n";
    return static_cast<int>(e.kind());
  }
}
