// The Llama family on the CPU: Llama, SmolLM2, Mistral, Qwen2, Qwen3. fp32 arithmetic, weights in f32 or bf16.
#pragma once
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core/gemm.h"
#include "model/model_files.h"
#include "model/runtime.h"

namespace vqkv {

class LlamaCpu final : public ModelRuntime {
 public:
  // The tokenizer is loaded from `tokenizer_path` when it is first asked for.
  LlamaCpu(const ModelWeights& weights, DType storage, std::string tokenizer_path);
  // A draft of `whole`.
  LlamaCpu(const LlamaCpu& whole, DraftWeights weights, int group);
  ~LlamaCpu() override;

  const ModelFacts& facts() const override { return facts_; }
  std::string weights() const override;
  const Tokenizer& tokenizer() const override;
  // Calls are serialised: one set of activations.
  void forward_batch(std::span<const SequenceBlock> batch, LogitRows rows, MutMatrix logits) override;
  double backward(std::span<const int32_t> tokens, LogitLoss& loss, GradientTap& tap) override;
  ConstMatrix output_weight(int layer) const override;
  std::unique_ptr<ModelRuntime> draft(DraftWeights weights, int group) const override;
  int64_t weight_bytes() const override;

 private:
  struct Backward;                          // of one window
  static constexpr int64_t kMlpTile = 512;  // bounds the widest activation (tile, 2*ffn), however long the block
  struct Layer {
    std::vector<float> attention_norm, ffn_norm, qkv_bias, o_bias, q_norm, k_norm;
    PackedWeights qkv, out, gate_up, down;
  };
  struct Activations {
    AlignedVector<float> stream, normed, qkv, attended, wide;  // (n, hidden) x2, (n, q+2kv), (n, q), (tile, 2*ffn)
  };
  void require_runnable(const SequenceBlock& block) const;
  void run(std::span<const SequenceBlock> batch, int64_t n, LogitRows rows, MutMatrix logits);
  void require_tokens(std::span<const int32_t> tokens) const;
  // unnormed (n, q+k), where given and the model has q/k norm: what goes into it.
  void attention_inputs(const Layer& layer, ConstMatrix x, MutMatrix qkv, MutMatrix unnormed = {}) const;
  void mlp(const Layer& layer, MutMatrix x);

  ModelFacts facts_;
  DType storage_;
  std::string rounded_;  // which matrices are in 4 bits; empty: none
  std::vector<Layer> layers_;
  PackedWeights embedding_, head_;  // one copy when tied
  std::vector<float> final_norm_;
  std::string tokenizer_path_;
  mutable std::mutex lazy_;  // tokenizer and output weights
  mutable std::unique_ptr<Tokenizer> tokenizer_;
  mutable std::vector<Matrix<float>> plain_out_;  // (hidden, q) per layer, unpacked when asked for
  std::mutex running_;
  Activations act_;
};

}  // namespace vqkv
