#include "generation/generate.h"

#include <algorithm>

#include "generation/decoding.h"

namespace vqkv {

Generated generate(ModelRuntime& model, KvSession& kv, std::span<const int32_t> prompt, const GenerateOptions& options,
                   const std::function<bool(int32_t)>& on_token, const std::function<void()>& before_pass) {
  Decoding text(model, kv, prompt, options, on_token);
  Matrix<float> logits(1, model.facts().vocab);
  // No logits are needed after the last token.
  for (bool more = text.begin(); more; more = text.draw(logits.row(0))) {
    const int32_t token = text.last();
    if (before_pass) before_pass();
    model.forward(std::span(&token, 1), kv, LogitRows::kLast, logits);
    text.count_step();
  }
  return text.finish();
}

std::vector<int32_t> Generated::with_stop() const {
  std::vector<int32_t> out = tokens;
  if (stop_token >= 0) out.push_back(stop_token);
  return out;
}

int64_t first_divergence(const Generated& a, const Generated& b) {
  const auto x = a.with_stop(), y = b.with_stop();
  const auto [i, j] = std::mismatch(x.begin(), x.end(), y.begin(), y.end());
  return i == x.end() && j == y.end() ? -1 : i - x.begin();
}

}  // namespace vqkv
