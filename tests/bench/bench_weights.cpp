// What bf16 weights cost: the full-vocabulary KL divergence of a model with bf16 weights from the same with fp32.
//   bench_weights MODEL TEXT [TOKENS [CONTEXT]]      # 2048 tokens in windows of 1024
//   VQKV_CPU=avx512 bench_weights ...                # inputs of products stay fp32
// Prints one line of JSON: KL(f32 || bf16) in nats over every position (mean, largest), and how often the arg-max
// agrees.
#include <algorithm>
#include <cstdlib>
#include <iostream>

#include "attention/session_cpu.h"
#include "core/json.h"
#include "generation/logits.h"
#include "io/atomic_file.h"
#include "model/runtime.h"

namespace vqkv {
namespace {

struct Side {
  explicit Side(const std::string& path, DType weights) : model(load_model(path, {.weights = weights})) {}
  void restart() {
    kv.reset();
    cache = std::make_unique<CompressedCache>(exact_codec_set(model->facts().cache_shape()),
                                              CachePolicy::exact(DType::kF32));
    kv = std::make_unique<KvSessionCpu>(*cache, *backend);
  }
  std::unique_ptr<ModelRuntime> model;
  std::unique_ptr<AttentionBackend> backend = make_attention_backend("cpu-reconstruct");
  std::unique_ptr<CompressedCache> cache;
  std::unique_ptr<KvSessionCpu> kv;
};

void compare(const std::string& path, const std::string& text, int64_t most, int64_t context) {
  if (most < 1 || context < 1) fail_usage("tokens and context must be at least 1");
  Side wide(path, DType::kF32), narrow(path, DType::kBF16);
  std::vector<int32_t> ids = wide.model->tokenizer().encode(read_file(text));
  ids.resize(std::min(ids.size(), static_cast<size_t>(most)));
  const int64_t vocab = wide.model->facts().vocab, tokens = static_cast<int64_t>(ids.size());
  constexpr int64_t kBlock = 256;
  Matrix<float> a(kBlock, vocab), b(kBlock, vocab);
  double total = 0, largest = 0;
  int64_t same_top = 0;
  for (int64_t first = 0; first < tokens;) {
    const int64_t n = std::min({kBlock, tokens - first, context - first % context});
    for (Side* side : {&wide, &narrow}) {
      if (first % context == 0) side->restart();
      side->model->forward(std::span(ids).subspan(static_cast<size_t>(first), static_cast<size_t>(n)), *side->kv,
                           LogitRows::kAll, (side == &wide ? a : b).view().slice_rows(0, n));
    }
    for (int64_t r = 0; r < n; ++r) {
      const float *p = a.row(r), *q = b.row(r);
      const LogitFacts fp = logit_facts(p, vocab, 0), fq = logit_facts(q, vocab, 0);
      const double kld = kl_divergence(p, fp.log_sum, q, fq.log_sum, vocab);
      total += kld;
      largest = std::max(largest, kld);
      same_top += fp.top == fq.top;
    }
    first += n;
  }
  const double n = static_cast<double>(std::max<int64_t>(tokens, 1));
  std::cout << Json{{"weights", narrow.model->weights()},
                    {"tokens", tokens},
                    {"context", context},
                    {"kld_mean", total / n},
                    {"kld_max", largest},
                    {"same_top", static_cast<double>(same_top) / n}}
                   .dump()
            << "\n";
}

}  // namespace
}  // namespace vqkv

int main(int argc, char** argv) {
  if (argc < 3 || argc > 5) {
    std::cerr << "usage: bench_weights MODEL TEXT [TOKENS [CONTEXT]]\n";
    return 2;
  }
  try {
    vqkv::compare(argv[1], argv[2], argc > 3 ? std::atoll(argv[3]) : 2048, argc > 4 ? std::atoll(argv[4]) : 1024);
  } catch (const vqkv::Error& e) {
    std::cerr << "error: " << e.what() << "\n";
    return static_cast<int>(e.kind());
  }
}
