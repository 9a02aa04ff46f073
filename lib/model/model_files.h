// Model files: from a GGUF file or a Hugging Face folder to checked facts and fp32 tensors of one naming and one
// layout. Families: llama (with SmolLM2, and Mistral in GGUF), mistral, qwen2 (bias on q, k, v), qwen3 (norm on q and
// k); llama and qwen3 may have biases on q, k, v and the output. What a model needs beyond them (another architecture,
// experts, other biases, a tensor of another shape) is kBadData naming it: nothing is ignored that would change the
// result. A sliding window is a fact (ModelFacts::sliding_window), and contexts beyond it are refused where they are
// known.
#pragma once
#include <cstdint>
#include <memory>
#include <string>

#include "core/view.h"
#include "model/runtime.h"

namespace vqkv {

enum class Weight {
  kEmbedding,  // (vocab, hidden)
  kHead,       // (vocab, hidden); the embedding where the head is tied
  kFinalNorm,  // (1, hidden)
  // Of a layer:
  kAttentionNorm,  // (1, hidden)
  kQ,              // (q_heads * head_dim, hidden)
  kK,              // (kv_heads * head_dim, hidden)
  kV,              // (kv_heads * head_dim, hidden)
  kO,              // (hidden, q_heads * head_dim)
  kQBias,          // (1, q_heads * head_dim), when facts().qkv_bias
  kKBias,          // (1, kv_heads * head_dim), when facts().qkv_bias
  kVBias,          // (1, kv_heads * head_dim), when facts().qkv_bias
  kOBias,          // (1, hidden), when facts().o_bias
  kQNorm,          // (1, head_dim), when facts().qk_norm
  kKNorm,          // (1, head_dim), when facts().qk_norm
  kFfnNorm,        // (1, hidden)
  kGate,           // (ffn, hidden)
  kUp,             // (ffn, hidden)
  kDown,           // (hidden, ffn)
};

// Row-major (out, in) fp32. Query and key rows (weights and biases) are in half-split order, as in Hugging Face: a GGUF
// of the llama architecture stores them interleaved and is put back in order here.
class ModelWeights {
 public:
  static std::unique_ptr<ModelWeights> open(const std::string& path);
  virtual ~ModelWeights() = default;

  const ModelFacts& facts() const { return facts_; }
  // False for biases and norms that the model doesn't have.
  bool has(Weight weight) const;
  int64_t rows(Weight weight) const;
  int64_t cols(Weight weight) const;

  // All rows into `out` (rows x cols, any stride), dequantized by all threads; no further copy is held. `layer` is
  // ignored for the three tensors that belong to none. kBadData when a weight is not finite: attention would hide it.
  void read(Weight weight, int layer, MutMatrix out) const;
  Matrix<float> read(Weight weight, int layer = 0) const;
  // Rows [first, first + count) only, on the calling thread.
  void read_rows(Weight weight, int layer, int64_t first, int64_t count, MutMatrix out) const;

 protected:
  // One tensor as stored. The bytes stay in the mapped file.
  struct Stored {
    const uint8_t* data = nullptr;
    uint32_t type = 0;         // a GgmlType
    bool interleaved = false;  // rows of each head are (pair, half) instead of (half, pair)
    std::string where;         // file and tensor, for errors
  };
  virtual Stored stored(Weight weight, int layer) const = 0;

  ModelFacts facts_;
};

}  // namespace vqkv
