// A GGUF file of a qwen2 model with random weights, of any shape.
#pragma once
#include <fmt/format.h>

#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "core/rng.h"
#include "io/atomic_file.h"
#include "support/model_writers.h"

namespace vqkv::test {

struct RandomModel {
  int layers = 2, hidden = 96, ffn = 128, q_heads = 4, kv_heads = 2, head_dim = 32, vocab = 64;
};

inline void write_random_model(const std::string& path, const RandomModel& m) {
  testing::GgufBuilder b;
  const auto number = [](int v) { return static_cast<uint32_t>(v); };
  b.text("general.architecture", "qwen2").text("general.name", "wide");
  b.u32("qwen2.block_count", number(m.layers)).u32("qwen2.embedding_length", number(m.hidden));
  b.u32("qwen2.feed_forward_length", number(m.ffn)).u32("qwen2.context_length", 512);
  b.u32("qwen2.attention.head_count", number(m.q_heads)).u32("qwen2.attention.head_count_kv", number(m.kv_heads));
  b.u32("qwen2.attention.key_length", number(m.head_dim)).u32("qwen2.attention.value_length", number(m.head_dim));
  b.f32("qwen2.attention.layer_norm_rms_epsilon", 1e-6f).f32("qwen2.rope.freq_base", 10000);
  b.text("tokenizer.ggml.model", "gpt2").text("tokenizer.ggml.pre", "gpt-2");
  const auto array = [](uint32_t type, const std::vector<std::string>& items) {
    std::string out = testing::raw(type) + testing::raw(uint64_t{items.size()});
    for (const std::string& item : items) out += item;
    return out;
  };
  std::vector<std::string> tokens, types;
  for (int i = 0; i < m.vocab; ++i) {
    tokens.push_back(testing::gguf_text(i + 1 < m.vocab ? std::string(1, static_cast<char>('0' + i)) : "01"));
    types.push_back(testing::raw(int32_t{1}));
  }
  b.values.push_back({"tokenizer.ggml.tokens", array(8, tokens), 9});
  b.values.push_back({"tokenizer.ggml.token_type", array(5, types), 9});
  b.values.push_back({"tokenizer.ggml.merges", array(8, {testing::gguf_text("0 1")}), 9});
  uint64_t seed = 1;
  const auto matrix = [&](const std::string& name, int rows, int cols) {
    // Of a size that keeps activations near one.
    Rng rng(seed++);
    std::vector<float> w(static_cast<size_t>(rows) * static_cast<size_t>(cols));
    for (float& v : w) v = static_cast<float>(rng.normal() / std::sqrt(static_cast<double>(cols)));
    b.tensor(name, {rows, cols}, w);
  };
  const auto vector = [&](const std::string& name, int n, float value) {
    b.tensor(name, {n}, std::vector<float>(static_cast<size_t>(n), value));
  };
  matrix("token_embd.weight", m.vocab, m.hidden);
  vector("output_norm.weight", m.hidden, 1);
  for (int l = 0; l < m.layers; ++l) {
    const std::string at = fmt::format("blk.{}.", l);
    vector(at + "attn_norm.weight", m.hidden, 1);
    vector(at + "ffn_norm.weight", m.hidden, 1);
    for (const auto& [name, heads] :
         {std::pair("attn_q", m.q_heads), std::pair("attn_k", m.kv_heads), std::pair("attn_v", m.kv_heads)}) {
      matrix(at + name + ".weight", heads * m.head_dim, m.hidden);
      vector(at + name + ".bias", heads * m.head_dim, 0.25f);
    }
    matrix(at + "attn_output.weight", m.hidden, m.q_heads * m.head_dim);
    matrix(at + "ffn_gate.weight", m.ffn, m.hidden);
    matrix(at + "ffn_up.weight", m.ffn, m.hidden);
    matrix(at + "ffn_down.weight", m.hidden, m.ffn);
  }
  write_file(path, b.build());
}

}  // namespace vqkv::test
