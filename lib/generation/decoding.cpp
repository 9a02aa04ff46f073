#include "generation/decoding.h"

#include <fmt/format.h>

#include <algorithm>

namespace vqkv {

Decoding::Decoding(ModelRuntime& model, KvSession& kv, std::span<const int32_t> prompt, const GenerateOptions& options,
                   std::function<bool(int32_t)> on_token, ModelTap* tap)
    : options_(options),
      on_token_(std::move(on_token)),
      sampler_(options.sampling),
      prompt_logits_(1, model.facts().vocab) {
  if (prompt.empty()) fail_usage("generation needs a prompt of at least one token");
  if (options.new_tokens < 0) fail_usage(fmt::format("new tokens: {}; allowed: 0 or more", options.new_tokens));
  const int64_t before = kv.cache().length(), given = static_cast<int64_t>(prompt.size());
  model.facts().require_context(before + given + options.new_tokens);
  watch_.restart();
  if (options.exact_prefill) kv.expect_prompt(before + given);
  model.forward(prompt, kv, LogitRows::kLast, prompt_logits_,
                options.exact_prefill ? Visibility::kExactPrefill : Visibility::kReplay, tap);
  if (options.exact_prefill) kv.end_exact_prefill();
  result_.prefill_seconds = watch_.seconds();
  watch_.restart();
}

bool Decoding::draw(const float* logits) {
  if (left() <= 0) return false;
  const int32_t token = sampler_.next(std::span(logits, static_cast<size_t>(prompt_logits_.cols)));
  if (std::find(options_.stop.begin(), options_.stop.end(), token) != options_.stop.end()) {
    result_.stop_token = token;
    return false;
  }
  result_.tokens.push_back(token);
  return !(on_token_ && !on_token_(token)) && left() > 0;
}

Generated Decoding::finish() {
  result_.decode_seconds = watch_.seconds();
  return std::move(result_);
}

}  // namespace vqkv
