// Small models of every family, as GGUF and as a Hugging Face folder, and how they are refused.
#pragma once
#include "model/model_files.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>

#include "core/error.h"
#include "core/json.h"
#include "support/catch.h"
#include "support/error_of.h"
#include "support/model_writers.h"

namespace vqkv::testing {

constexpr int kLayers = 2, kHidden = 12, kQ = 4, kKv = 2, kDim = 6, kFfn = 20, kVocab = 11;

// The value of element i of tensor `seed`: distinct, exact in fp32.
inline std::vector<float> values(int64_t n, int seed) {
  std::vector<float> v(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) v[static_cast<size_t>(i)] = static_cast<float>(seed * 1000 + i) / 64;
  return v;
}

// As ggml's llama files store query and key rows: (head, pair, half) from (head, half, pair).
inline std::vector<float> interleave(const std::vector<float>& v, int heads, int64_t cols) {
  std::vector<float> out(v.size());
  for (int h = 0; h < heads; ++h)
    for (int s = 0; s < 2; ++s)
      for (int i = 0; i < kDim / 2; ++i)
        for (int64_t c = 0; c < cols; ++c)
          out[static_cast<size_t>((h * kDim + 2 * i + s) * cols + c)] =
              v[static_cast<size_t>((h * kDim + s * (kDim / 2) + i) * cols + c)];
  return out;
}

struct Named {
  const char *gguf, *hf;
  int rows, cols;
  bool q, k;
};
inline std::vector<Named> layer_tensors(const std::string& family) {
  std::vector<Named> t{{"attn_norm.weight", "input_layernorm.weight", 1, kHidden, false, false},
                       {"attn_q.weight", "self_attn.q_proj.weight", kQ * kDim, kHidden, true, false},
                       {"attn_k.weight", "self_attn.k_proj.weight", kKv * kDim, kHidden, false, true},
                       {"attn_v.weight", "self_attn.v_proj.weight", kKv * kDim, kHidden, false, false},
                       {"attn_output.weight", "self_attn.o_proj.weight", kHidden, kQ * kDim, false, false},
                       {"ffn_norm.weight", "post_attention_layernorm.weight", 1, kHidden, false, false},
                       {"ffn_gate.weight", "mlp.gate_proj.weight", kFfn, kHidden, false, false},
                       {"ffn_up.weight", "mlp.up_proj.weight", kFfn, kHidden, false, false},
                       {"ffn_down.weight", "mlp.down_proj.weight", kHidden, kFfn, false, false}};
  if (family == "qwen2" || family.ends_with("+bias")) {
    t.push_back({"attn_q.bias", "self_attn.q_proj.bias", 1, kQ * kDim, true, false});
    t.push_back({"attn_k.bias", "self_attn.k_proj.bias", 1, kKv * kDim, false, true});
    t.push_back({"attn_v.bias", "self_attn.v_proj.bias", 1, kKv * kDim, false, false});
  }
  if (family.ends_with("+bias")) t.push_back({"attn_output.bias", "self_attn.o_proj.bias", 1, kHidden, false, false});
  if (family.starts_with("qwen3")) {
    t.push_back({"attn_q_norm.weight", "self_attn.q_norm.weight", 1, kDim, false, false});
    t.push_back({"attn_k_norm.weight", "self_attn.k_norm.weight", 1, kDim, false, false});
  }
  return t;
}

inline std::vector<int64_t> shape(const Named& t) {
  return t.rows == 1 ? std::vector<int64_t>{t.cols} : std::vector<int64_t>{t.rows, t.cols};
}

inline GgufBuilder gguf_model(const std::string& family, bool tied) {
  const bool llama = family.starts_with("llama");
  const std::string arch = family.substr(0, family.find('+'));
  GgufBuilder b;
  b.text("general.architecture", arch).text("general.name", "tiny");
  b.u32(arch + ".block_count", kLayers)
      .u32(arch + ".embedding_length", kHidden)
      .u32(arch + ".feed_forward_length", kFfn);
  b.u32(arch + ".attention.head_count", kQ)
      .u32(arch + ".attention.head_count_kv", kKv)
      .u32(arch + ".context_length", 256);
  b.u32(arch + ".attention.key_length", kDim).u32(arch + ".attention.value_length", kDim);
  b.f32(arch + ".attention.layer_norm_rms_epsilon", 1e-6f).f32(arch + ".rope.freq_base", 50000);
  b.tensor("token_embd.weight", {kVocab, kHidden}, values(kVocab * kHidden, 1));
  b.tensor("output_norm.weight", {kHidden}, values(kHidden, 2));
  if (!tied) b.tensor("output.weight", {kVocab, kHidden}, values(kVocab * kHidden, 3));
  for (int layer = 0; layer < kLayers; ++layer) {
    int seed = 10 + 20 * layer;
    for (const Named& t : layer_tensors(family)) {
      std::vector<float> v = values(t.rows * t.cols, seed++);
      if (llama && (t.q || t.k)) v = interleave(v, t.q ? kQ : kKv, t.rows == 1 ? 1 : t.cols);
      b.tensor("blk." + std::to_string(layer) + "." + t.gguf, shape(t), v);
    }
  }
  return b;
}

struct HfModel {
  Json config;
  SafetensorsBuilder weights;
};
inline HfModel hf_model(const std::string& family, bool tied) {
  HfModel m;
  m.config = {{"model_type", family.substr(0, family.find('+'))},
              {"num_hidden_layers", kLayers},
              {"hidden_size", kHidden},
              {"intermediate_size", kFfn},
              {"num_attention_heads", kQ},
              {"num_key_value_heads", kKv},
              {"head_dim", kDim},
              {"vocab_size", kVocab},
              {"max_position_embeddings", 256},
              {"rms_norm_eps", 1e-6},
              {"rope_theta", 50000.0},
              {"hidden_act", "silu"},
              {"tie_word_embeddings", tied},
              {"attention_bias", family.ends_with("+bias")},
              {"sliding_window", nullptr}};
  m.weights.tensor("model.embed_tokens.weight", {kVocab, kHidden}, values(kVocab * kHidden, 1));
  m.weights.tensor("model.norm.weight", {kHidden}, values(kHidden, 2));
  if (!tied) m.weights.tensor("lm_head.weight", {kVocab, kHidden}, values(kVocab * kHidden, 3));
  for (int layer = 0; layer < kLayers; ++layer) {
    int seed = 10 + 20 * layer;
    for (const Named& t : layer_tensors(family))
      m.weights.tensor("model.layers." + std::to_string(layer) + "." + t.hf, shape(t), values(t.rows * t.cols, seed++));
  }
  return m;
}

inline std::unique_ptr<ModelWeights> open_hf(const TempFolder& folder, const HfModel& m) {
  folder.write("config.json", m.config.dump());
  folder.write("model.safetensors", m.weights.build());
  return ModelWeights::open(folder.path());
}

inline std::string gguf_refusal(const std::string& family, const std::function<void(GgufBuilder&)>& change) {
  const TempFolder folder;
  GgufBuilder b = gguf_model(family, true);
  change(b);
  const std::string path = folder.write("m.gguf", b.build());
  return data_error_of([&] { ModelWeights::open(path); });
}
inline std::string hf_refusal(const std::string& family, const std::function<void(HfModel&)>& change) {
  const TempFolder folder;
  HfModel m = hf_model(family, true);
  change(m);
  return data_error_of([&] { open_hf(folder, m); });
}
constexpr Weight kAll[] = {Weight::kEmbedding, Weight::kHead,    Weight::kFinalNorm, Weight::kAttentionNorm,
                           Weight::kQ,         Weight::kK,       Weight::kV,         Weight::kO,
                           Weight::kQBias,     Weight::kKBias,   Weight::kVBias,     Weight::kQNorm,
                           Weight::kKNorm,     Weight::kFfnNorm, Weight::kGate,      Weight::kUp,
                           Weight::kDown,      Weight::kOBias};

}  // namespace vqkv::testing
