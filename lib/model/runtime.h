// ModelRuntime: the reference runtime. One model file, three uses: capture (a Tap), replay (a KvSession), generation.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "attention/session.h"
#include "core/json_fwd.h"
#include "model/backward.h"
#include "model/tokenizer.h"

namespace vqkv {

struct ModelFacts {
  std::string name, architecture, source;  // source: "gguf" or "hf"
  // Identity of the content: SHA-256 over the sizes and the XXH3-128 of each 64 MiB of the GGUF, or of config.json and
  // the safetensors files in name order. Every byte counts; the files' own names don't.
  std::string hash;
  int layers = 0, hidden = 0, q_heads = 0, kv_heads = 0, head_dim = 0, ffn = 0, vocab = 0;
  int64_t context_length = 0;
  // Tokens that a query of some layer sees, its own included; 0: all. The runtime computes full attention, which is the
  // same up to this many tokens.
  int64_t sliding_window = 0;
  int64_t parameters = 0;
  double norm_eps = 1e-5;
  bool tied_head = false, qkv_bias = false, o_bias = false, qk_norm = false;
  RopeFacts rope;
  CacheShape cache_shape() const;
  // The longest context that the runtime computes as the model means it.
  int64_t longest_context() const;
  // kUsage where a context of so many tokens is beyond it.
  void require_context(int64_t tokens) const;
  int64_t kv_bytes_per_token(DType dtype) const;  // 2 * layers * kv_heads * head_dim * size
  Json to_json() const;
};

// Sees pre-RoPE Q, K, V of every layer (after bias and q/k norm), and each layer's attention output before W_O.
struct ModelTap {
  virtual ~ModelTap() = default;
  // q (n, q_heads*d), k and v (n, kv_heads*d)
  virtual void on_qkv(int layer, int64_t first_position, ConstMatrix q, ConstMatrix k, ConstMatrix v) = 0;
};

struct RuntimeOptions {
  // kF32, or kBF16: rounded to nearest even. Where bf16 products outrun fp32's (CpuFeatures::bf16_products) the inputs
  // of products with bf16 weights are rounded to bf16 too; elsewhere they stay fp32. ModelRuntime::weights() tells.
  DType weights = DType::kF32;
};

// Of which matrices a draft of a model holds 4-bit weights.
enum class DraftWeights { kMlp, kLayers };

enum class LogitRows { kNone, kLast, kAll };

// New tokens of one sequence.
struct SequenceBlock {
  std::span<const int32_t> tokens;  // at positions [kv->cache().length(), ...)
  KvSession* kv = nullptr;
  Visibility visibility = Visibility::kReplay;
  ModelTap* tap = nullptr;
};

class ModelRuntime {
 public:
  virtual ~ModelRuntime() = default;
  virtual const ModelFacts& facts() const = 0;
  // What ran, for rows of results: "f32", "bf16 x f32" (weights x inputs) or "bf16 x bf16". Sums are fp32.
  virtual std::string weights() const = 0;
  virtual const Tokenizer& tokenizer() const = 0;  // kBadData when the model came without one
  const Tokenizer* find_tokenizer() const;         // nullptr instead
  // Runs one block of each sequence: teacher forcing. A step is a block of one token; a long prompt may be given in
  // blocks of any size. Products with weights run once over the rows of all sequences, attention for each alone, and
  // every sequence gets the bits that it gets alone. logits: (rows, vocab) in the order of the batch, rows = tokens for
  // kAll, blocks for kLast. No block is empty or reaches beyond its cache's block_limit(), no session stands twice.
  virtual void forward_batch(std::span<const SequenceBlock> batch, LogitRows rows, MutMatrix logits) = 0;
  // A batch of one; no tokens are nothing to do.
  void forward(std::span<const int32_t> tokens, KvSession& kv, LogitRows rows, MutMatrix logits,
               Visibility visibility = Visibility::kReplay, ModelTap* tap = nullptr);
  // The gradient of a loss with respect to the keys and values of every layer (model/backward.h), through one window at
  // positions [0, tokens) with the exact cache; returns the loss. Three forward passes' time and, beside what a forward
  // of the window takes, memory for each layer's input (tokens, hidden): the rest is made again layer by layer. Where
  // products round their inputs (RuntimeOptions::weights) the gradient takes no notice. The same bits at any thread
  // count. kUsage for an empty window, one beyond the longest context, tokens outside the vocabulary and what the loss
  // refuses; kUnavailable from a runtime without a backward pass.
  virtual double backward(std::span<const int32_t> tokens, LogitLoss& loss, GradientTap& tap);
  // The same model with matrices rounded to 4 bits (PackedWeights::quantized, of `group` inputs): those of the MLPs, or
  // of all layers. It shares the rest with this one, and no activations. kUnavailable from a runtime without such.
  virtual std::unique_ptr<ModelRuntime> draft(DraftWeights weights, int group) const;
  // Bytes of the weights that a forward pass with logits reads, embeddings apart; 0 where that is not known.
  virtual int64_t weight_bytes() const { return 0; }
  // W_O of a layer, (hidden, q_heads*d).
  virtual ConstMatrix output_weight(int layer) const = 0;
};

// A GGUF file or a Hugging Face folder. Refuses by name (kBadData) what is not supported.
std::unique_ptr<ModelRuntime> load_model(const std::string& path, const RuntimeOptions& options = {});
// Facts only: checks every tensor's shape and hashes the files once, dequantizes nothing.
ModelFacts read_model_facts(const std::string& path);

}  // namespace vqkv
