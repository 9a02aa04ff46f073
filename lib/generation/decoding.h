// What every way of generating does alike: reads the prompt, draws tokens, ends.
#pragma once
#include <functional>
#include <span>

#include "core/clock.h"
#include "generation/generate.h"

namespace vqkv {

class Decoding {
 public:
  // Runs the prompt, which `tap` sees; errors are generate()'s. on_token may be empty.
  Decoding(ModelRuntime& model, KvSession& kv, std::span<const int32_t> prompt, const GenerateOptions& options,
           std::function<bool(int32_t)> on_token, ModelTap* tap = nullptr);

  // Draws the first token, from the logits of the prompt's last; false as draw().
  bool begin() { return draw(prompt_logits_.row(0)); }
  // Draws the next token from a row of logits (vocab); false: the text ends with it, or has all its tokens.
  bool draw(const float* logits);
  int32_t last() const { return result_.tokens.back(); }
  int32_t last_drawn() const { return result_.stop_token >= 0 ? result_.stop_token : last(); }
  int64_t left() const { return options_.new_tokens - static_cast<int64_t>(result_.tokens.size()); }
  // A pass of the model that logits were drawn from.
  void count_step() { ++result_.decode_steps; }
  Generated finish();

 private:
  const GenerateOptions& options_;
  std::function<bool(int32_t)> on_token_;
  Sampler sampler_;
  Matrix<float> prompt_logits_;  // (1, vocab)
  Generated result_;
  Stopwatch watch_;
};

}  // namespace vqkv
