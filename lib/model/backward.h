// Gradients with respect to what a KV cache holds: what Fisher weights and sensitivities are made of. A window goes
// forward once at its exact keys and values, a loss of its logits says where it hurts, and a backward pass to the
// activations (ModelRuntime::backward; no weight has a gradient) hands out every layer's rows.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "core/view.h"

namespace vqkv {

// A sum over positions of something that each position's logits decide alone.
class LogitLoss {
 public:
  virtual ~LogitLoss() = default;
  // kUsage where it does not suit a window of so many tokens of a model with this vocabulary.
  virtual void require(int64_t tokens, int64_t vocab) const = 0;
  // The loss of positions [first, first + logits.rows), in nats, whose logits (rows, vocab) become its gradient with
  // respect to them. Positions come in order, each once.
  virtual double differentiate(int64_t first, MutMatrix logits) = 0;
};

// Sum of -log p(label) over the positions that have one.
class NllLoss final : public LogitLoss {
 public:
  static constexpr int32_t kNoLabel = -1;
  // labels (tokens): what is scored at each position, or kNoLabel.
  explicit NllLoss(std::vector<int32_t> labels) : labels_(std::move(labels)) {}
  // The next token everywhere but at the end: the training loss of a language model.
  static NllLoss next_tokens(std::span<const int32_t> tokens);

  void require(int64_t tokens, int64_t vocab) const override;
  double differentiate(int64_t first, MutMatrix logits) override;

 private:
  std::vector<int32_t> labels_;
};

// The same with labels that the model draws itself at every position but the last: squares of these gradients estimate
// the Fisher information, those of next_tokens the empirical one. Position t's draw is that of stream t of `seed`.
class SampledNllLoss final : public LogitLoss {
 public:
  explicit SampledNllLoss(int64_t tokens, uint64_t seed) : tokens_(tokens), seed_(seed) {}
  void require(int64_t tokens, int64_t vocab) const override;
  double differentiate(int64_t first, MutMatrix logits) override;

 private:
  int64_t tokens_;
  uint64_t seed_;
};

// Sum of KL(target || model) over positions [first_position, first_position + log_p.rows).
class KldLoss final : public LogitLoss {
 public:
  // log_p (rows, vocab): logarithms of the target's probabilities, each row's summing to 1; outlives the loss.
  KldLoss(ConstMatrix log_p, int64_t first_position) : log_p_(log_p), first_position_(first_position) {}
  void require(int64_t tokens, int64_t vocab) const override;
  double differentiate(int64_t first, MutMatrix logits) override;

 private:
  ConstMatrix log_p_;
  int64_t first_position_;
};

// Sees the gradients of every layer once, from the last layer to the first: with respect to keys before RoPE (as
// ModelTap sees them: after bias and k norm), to the same keys after RoPE, and to values; each (tokens, kv_heads*d) and
// valid during the call. A row collects what all queries that see the token say.
struct GradientTap {
  virtual ~GradientTap() = default;
  virtual void on_gradients(int layer, ConstMatrix key, ConstMatrix rotated_key, ConstMatrix value) = 0;
};

}  // namespace vqkv
