#include "generation/generate.h"

#include <fmt/format.h>

#include <algorithm>

#include "core/clock.h"

namespace vqkv {

Generated generate(ModelRuntime& model, KvSession& kv, std::span<const int32_t> prompt, const GenerateOptions& options,
                   const std::function<bool(int32_t)>& on_token) {
  if (prompt.empty()) fail_usage("generation needs a prompt of at least one token");
  if (options.new_tokens < 0) fail_usage(fmt::format("new tokens: {}; allowed: 0 or more", options.new_tokens));
  const int64_t before = kv.cache().length(), given = static_cast<int64_t>(prompt.size());
  model.facts().require_context(before + given + options.new_tokens);

  Generated result;
  Sampler sampler(options.sampling);
  Matrix<float> logits(1, model.facts().vocab);
  Stopwatch watch;
  if (options.exact_prefill) kv.expect_prompt(before + given);
  model.forward(prompt, kv, LogitRows::kLast, logits,
                options.exact_prefill ? Visibility::kExactPrefill : Visibility::kReplay);
  if (options.exact_prefill) kv.end_exact_prefill();
  result.prefill_seconds = watch.seconds();

  const double first_step = watch.seconds();
  while (static_cast<int64_t>(result.tokens.size()) < options.new_tokens) {
    const int32_t token = sampler.next(std::span(logits.data(), static_cast<size_t>(logits.cols)));
    if (std::find(options.stop.begin(), options.stop.end(), token) != options.stop.end()) {
      result.stop_token = token;
      break;
    }
    result.tokens.push_back(token);
    if (on_token && !on_token(token)) break;
    if (static_cast<int64_t>(result.tokens.size()) == options.new_tokens) break;  // no logits are needed after the last
    model.forward(std::span(&token, 1), kv, LogitRows::kLast, logits);
    ++result.decode_steps;
  }
  result.decode_seconds = watch.seconds() - first_step;
  return result;
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
