// The Llama family on the CPU: Llama, SmolLM2, Mistral, Qwen2, Qwen3. fp32 arithmetic, weights in f32 or bf16.
#pragma once
#include <functional>
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
  ~LlamaCpu() override;

  const ModelFacts& facts() const override { return facts_; }
  std::string weights() const override;
  const Tokenizer& tokenizer() const override;
  void forward(std::span<const int32_t> tokens, KvSession& kv, LogitRows rows, MutMatrix logits,
               Visibility visibility = Visibility::kReplay, ModelTap* tap = nullptr) override;
  ConstMatrix output_weight(int layer) const override;

  // One layer's attention over all tokens so far: q (n, q_heads*d), k, v (n, kv_heads*d) pre-RoPE, out as q.
  using Attend = std::function<void(int layer, ConstMatrix q, ConstMatrix k, ConstMatrix v, MutMatrix out)>;
  // What forward() does, the attention given by the caller. Calls are serialised: one set of activations.
  void run(std::span<const int32_t> tokens, int64_t first_position, const Attend& attend, LogitRows rows,
           MutMatrix logits, ModelTap* tap = nullptr);
  int64_t weight_bytes() const;

 private:
  struct Layer {
    std::vector<float> attention_norm, ffn_norm, qkv_bias, o_bias, q_norm, k_norm;
    PackedWeights qkv, out, gate_up, down;
  };
  struct Activations {
    AlignedVector<float> stream, normed, qkv, attended, wide;  // (n, hidden) x2, (n, q+2kv), (n, q), (tile, 2*ffn)
  };
  void attention_inputs(const Layer& layer, ConstMatrix x, MutMatrix qkv);
  void mlp(const Layer& layer, MutMatrix x);

  ModelFacts facts_;
  DType storage_;
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
