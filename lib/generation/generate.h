// Generation: prefill, then one token at a time over a KvSession. Other ways to the same text: strategies/strategy.h.
#pragma once
#include <functional>
#include <span>
#include <vector>

#include "generation/sampler.h"
#include "model/runtime.h"

namespace vqkv {

struct GenerateOptions {
  int64_t new_tokens = 128;   // at most; a stop token ends earlier
  std::vector<int32_t> stop;  // usually tokenizer().special().stop; empty: run to new_tokens
  SamplingOptions sampling;
  bool exact_prefill = false;  // the prompt attends to exact K and V and is coded once at its end (mode prefill-exact)
};

struct Generated {
  std::vector<int32_t> tokens;  // without the prompt and without the stop token
  int32_t stop_token = -1;      // the stop token that ended it, or -1
  double prefill_seconds = 0;   // until the first token's logits
  double decode_seconds = 0;    // all later steps
  int64_t decode_steps = 0;     // passes of the model behind the prompt

  std::vector<int32_t> with_stop() const;  // tokens, and the stop token where one ended it
};

// Index of the first new token that differs, -1: none does. A stop token counts as a token: ending earlier is a
// divergence too.
int64_t first_divergence(const Generated& a, const Generated& b);

// Continues what `kv` holds with `prompt` (at least one token). on_token sees each token as it is drawn and ends the
// generation by returning false. kUsage when prompt and new tokens exceed the model's context length. before_pass:
// called before each step of the model.
Generated generate(ModelRuntime& model, KvSession& kv, std::span<const int32_t> prompt, const GenerateOptions& options,
                   const std::function<bool(int32_t)>& on_token = {}, const std::function<void()>& before_pass = {});

}  // namespace vqkv
