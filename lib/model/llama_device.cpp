#include "model/llama_device.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numbers>

#include "attention/exact_rows.h"
#include "core/error.h"
#include "device/gemm.h"
#include "model/model_files.h"

namespace vqkv {
namespace {

using device::Buffer;

Buffer<float> on_device(const ModelWeights& weights, Weight w, int layer, const char* name) {
  const Matrix<float> m = weights.read(w, layer);
  return Buffer<float>(std::span<const float>(m.storage.data(), m.storage.size()), name);
}

// Matrices one under the other, rounded to bf16.
Buffer<uint16_t> rounded(const ModelWeights& weights, std::initializer_list<Weight> parts, int layer,
                         const char* name) {
  std::vector<uint16_t> bits;
  for (const Weight w : parts) {
    const Matrix<float> m = weights.read(w, layer);
    bits.reserve(bits.size() + m.storage.size());
    for (const float v : m.storage) bits.push_back(to_bf16(v).bits);
  }
  return Buffer<uint16_t>(std::span<const uint16_t>(bits), name);
}

}  // namespace

struct LlamaDevice::Layer {
  Buffer<float> attention_norm, ffn_norm, qkv_bias, o_bias, q_norm, k_norm;
  Buffer<uint16_t> qkv, out, gate_up, down;
};

LlamaDevice::LlamaDevice(const ModelWeights& weights) : facts_(weights.facts()), rope_(facts_.rope) {
  device::require_device();
  at_head_dim(facts_.head_dim, [](auto) {});  // or refuses it
  for (int l = 0; l < facts_.layers; ++l) {
    Layer& layer = layers_.emplace_back();
    layer.attention_norm = on_device(weights, Weight::kAttentionNorm, l, "attention norm");
    layer.ffn_norm = on_device(weights, Weight::kFfnNorm, l, "MLP norm");
    if (facts_.qkv_bias) {
      std::vector<float> bias;
      for (const Weight w : {Weight::kQBias, Weight::kKBias, Weight::kVBias}) {
        const Matrix<float> part = weights.read(w, l);
        bias.insert(bias.end(), part.storage.begin(), part.storage.end());
      }
      layer.qkv_bias = Buffer<float>(std::span<const float>(bias), "q, k and v bias");
    }
    if (facts_.o_bias) layer.o_bias = on_device(weights, Weight::kOBias, l, "output bias");
    if (facts_.qk_norm) {
      layer.q_norm = on_device(weights, Weight::kQNorm, l, "q norm");
      layer.k_norm = on_device(weights, Weight::kKNorm, l, "k norm");
    }
    layer.qkv = rounded(weights, {Weight::kQ, Weight::kK, Weight::kV}, l, "W_Q, W_K, W_V");
    layer.out = rounded(weights, {Weight::kO}, l, "W_O");
    layer.gate_up = rounded(weights, {Weight::kGate, Weight::kUp}, l, "gate and up");
    layer.down = rounded(weights, {Weight::kDown}, l, "down");
  }
  embedding_ = rounded(weights, {Weight::kEmbedding}, 0, "embedding");
  if (!facts_.tied_head) own_head_ = rounded(weights, {Weight::kHead}, 0, "head");
  final_norm_ = on_device(weights, Weight::kFinalNorm, 0, "final norm");
}

LlamaDevice::~LlamaDevice() = default;

int64_t LlamaDevice::weight_bytes() const {
  size_t numbers = facts_.tied_head ? embedding_.size() : own_head_.size();
  for (const Layer& l : layers_) numbers += l.qkv.size() + l.out.size() + l.gate_up.size() + l.down.size();
  return static_cast<int64_t>(numbers * sizeof(uint16_t));
}

void LlamaDevice::make_room(int64_t rows) {
  if (rows <= room_) return;
  const auto room = static_cast<size_t>(rows), hidden = static_cast<size_t>(facts_.hidden),
             ffn = static_cast<size_t>(facts_.ffn), d = static_cast<size_t>(facts_.head_dim),
             q_cols = static_cast<size_t>(facts_.q_heads) * d,
             qkv_cols = q_cols + 2 * static_cast<size_t>(facts_.kv_heads) * d;
  stream_ = Buffer<float>(room * hidden, "residual stream");
  qkv_ = Buffer<float>(room * qkv_cols, "q, k and v");
  queries_ = Buffer<float>(room * q_cols, "queries");
  attended_ = Buffer<float>(room * q_cols, "attention output");
  wide_ = Buffer<float>(room * 2 * ffn, "gate and up rows");
  rounded_ = Buffer<uint16_t>(room * std::max({hidden, q_cols, ffn}), "inputs of products");
  room_ = rows;
}

void LlamaDevice::forward(std::span<const int32_t> tokens, std::span<const int32_t> positions,
                          DeviceAttention& attention, std::span<const int32_t> wanted, MutMatrix logits) {
  VQKV_CHECK(!tokens.empty() && positions.size() == tokens.size());
  VQKV_CHECK(wanted.empty() || (logits.rows == std::ssize(wanted) && logits.cols == facts_.vocab));
  std::vector<float> rotation;
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i] < 0 || tokens[i] >= facts_.vocab)
      fail_usage(fmt::format("token id {} is not in the vocabulary of {} (allowed: 0 to {})", tokens[i], facts_.name,
                             facts_.vocab - 1));
    const float* row = rope_.row(positions[i]);
    rotation.insert(rotation.end(), row, row + facts_.rope.rotary_dim);
  }
  const int n = static_cast<int>(tokens.size()), hidden = facts_.hidden, ffn = facts_.ffn, d = facts_.head_dim,
            q_cols = facts_.q_heads * d, qkv_cols = q_cols + 2 * facts_.kv_heads * d;
  make_room(n);
  const auto vocab = static_cast<size_t>(facts_.vocab);
  if (std::ssize(wanted) > logits_room_) {
    logits_ = Buffer<float>(wanted.size() * vocab, "logits");
    logits_room_ = std::ssize(wanted);
  }
  const Buffer<int32_t> ids(tokens, "tokens");
  const Buffer<float> turns(std::span<const float>(rotation), "rotation");

  const auto eps = static_cast<float>(facts_.norm_eps);
  embed_rows(ids.data(), embedding_.data(), n, hidden, stream_.data());
  for (int l = 0; l < facts_.layers; ++l) {
    const Layer& layer = layers_[static_cast<size_t>(l)];
    norm_rows_bf16(stream_.data(), layer.attention_norm.data(), eps, n, hidden, rounded_.data());
    device::multiply_rows_bf16(rounded_.data(), layer.qkv.data(), n, qkv_cols, hidden, false, qkv_.data());
    QkvRows rows;
    rows.qkv = qkv_.data();
    rows.bias = layer.qkv_bias.data();
    rows.q_norm = layer.q_norm.data();
    rows.k_norm = layer.k_norm.data();
    rows.norm_eps = eps;
    rows.rotation = turns.data();
    rows.rows = n;
    rows.q_heads = facts_.q_heads;
    rows.kv_heads = facts_.kv_heads;
    rows.head_dim = d;
    rows.rotary_dim = facts_.rope.rotary_dim;
    rows.query_scale = static_cast<float>(std::numbers::log2e / std::sqrt(static_cast<double>(d)));
    rows.queries = queries_.data();
    attention.attend(l, rows, attended_.data());
    round_rows_bf16(attended_.data(), int64_t{n} * q_cols, rounded_.data());
    device::multiply_rows_bf16(rounded_.data(), layer.out.data(), n, hidden, q_cols, true, stream_.data());
    if (layer.o_bias.size() > 0) add_bias_rows(stream_.data(), layer.o_bias.data(), n, hidden);
    norm_rows_bf16(stream_.data(), layer.ffn_norm.data(), eps, n, hidden, rounded_.data());
    device::multiply_rows_bf16(rounded_.data(), layer.gate_up.data(), n, 2 * ffn, hidden, false, wide_.data());
    swiglu_rows_bf16(wide_.data(), n, ffn, rounded_.data());
    device::multiply_rows_bf16(rounded_.data(), layer.down.data(), n, hidden, ffn, true, stream_.data());
    attention.launched(l);
  }
  if (wanted.empty()) return;
  norm_rows_bf16(stream_.data(), final_norm_.data(), eps, n, hidden, rounded_.data());
  const uint16_t* head = facts_.tied_head ? embedding_.data() : own_head_.data();
  for (size_t i = 0; i < wanted.size();) {  // runs of rows
    size_t run = 1;
    while (i + run < wanted.size() && wanted[i + run] == wanted[i] + static_cast<int32_t>(run)) ++run;
    device::multiply_rows_bf16(rounded_.data() + static_cast<size_t>(wanted[i]) * static_cast<size_t>(hidden), head,
                               static_cast<int>(run), facts_.vocab, hidden, false, logits_.data() + i * vocab);
    i += run;
  }
  for (int64_t r = 0; r < logits.rows; ++r)
    device::copy_out(logits.row(r), logits_.data() + static_cast<size_t>(r) * vocab, vocab * sizeof(float));
}

void QkvToHost::start(int layer, const QkvRows& rows) {
  const size_t bytes = static_cast<size_t>(rows.rows) * static_cast<size_t>(cols_) * sizeof(float);
  if (!copies_[0] || copies_[0]->bytes() < bytes)  // of the first layer, since all have as many rows
    for (auto& copy : copies_) copy = std::make_unique<device::HostCopy>(bytes, "rows for the host");
  rows_ = rows.rows;
  copies_[layer % 2]->start(rows.qkv, bytes);
}

ConstMatrix QkvToHost::wait(int layer) { return {static_cast<const float*>(copies_[layer % 2]->wait()), rows_, cols_}; }

}  // namespace vqkv
