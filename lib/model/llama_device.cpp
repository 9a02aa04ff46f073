#include "model/llama_device.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numbers>
#include <numeric>

#include "attention/exact_decode.h"
#include "attention/exact_prefill.h"
#include "core/error.h"
#include "device/gemm.h"
#include "model/llama_rows.h"
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

LlamaDevice::LlamaDevice(const ModelWeights& weights, int sequences, int64_t tokens)
    : facts_(weights.facts()),
      rope_(facts_.rope),
      most_pages_(static_cast<int>((tokens + kDevicePageTokens - 1) / kDevicePageTokens)),
      length_(static_cast<size_t>(sequences), 0) {
  VQKV_CHECK(sequences >= 1 && tokens >= 1);
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
  const size_t values = static_cast<size_t>(facts_.layers) * length_.size() * static_cast<size_t>(most_pages_) *
                        static_cast<size_t>(facts_.kv_heads * kDevicePageTokens * facts_.head_dim);
  // Pages of a sequence follow each other.
  std::vector<int32_t> pages(length_.size() * static_cast<size_t>(most_pages_));
  std::iota(pages.begin(), pages.end(), 0);
  pages_ = Buffer<int32_t>(std::span<const int32_t>(pages), "page table");
  keys_ = Buffer<uint16_t>(values, "keys");
  values_ = Buffer<uint16_t>(values, "values");
}

LlamaDevice::~LlamaDevice() = default;

// Blocks next to each other that one kernel attends: of a token each, or of more.
struct LlamaDevice::Attention {
  struct Run {
    bool steps = false;
    int first_block = 0, blocks = 0, first_row = 0;
    int64_t longest = 0;  // steps: tokens that a sequence holds; else tokens of a block
  };
  std::vector<Run> runs;
  Buffer<PrefillBlock> blocks;
  Buffer<int32_t> sequences, lengths;  // of rows: whose they are, and how many tokens they see
};

ExactDecoder& LlamaDevice::decoder(int sequences, int64_t longest) {
  // Contexts are cut while there are fewer parts than fill a card.
  const int parts = sequences * facts_.kv_heads;
  const int splits = std::clamp(std::min(256 / parts, static_cast<int>(longest / 256)), 1, 64);
  if (!decoder_ || decoder_rows_ != sequences || decoder_splits_ != splits) {
    decoder_ = std::make_unique<ExactDecoder>(sequences, facts_.kv_heads, facts_.q_heads / facts_.kv_heads,
                                              facts_.head_dim, splits);
    decoder_rows_ = sequences, decoder_splits_ = splits;
  }
  return *decoder_;
}

void LlamaDevice::attend(int layer, const Attention& batch) {
  const size_t of_layer = keys_.size() / static_cast<size_t>(facts_.layers) * static_cast<size_t>(layer);
  const auto describe = [&](auto& call) {
    call.keys = keys_.data() + of_layer;
    call.values = values_.data() + of_layer;
    call.page_table = pages_.data();
    call.kv_heads = facts_.kv_heads;
    call.group = facts_.q_heads / facts_.kv_heads;
    call.head_dim = facts_.head_dim;
    call.most_pages = most_pages_;
  };
  for (const Attention::Run& run : batch.runs) {
    if (run.steps) {
      const auto row = static_cast<size_t>(run.first_row);
      const size_t at = row * static_cast<size_t>(facts_.q_heads * facts_.head_dim);
      ExactDecode call;
      describe(call);
      call.queries = queries_.data() + at;
      call.out = attended_.data() + at;
      call.table = batch.sequences.data() + row;
      call.lengths = batch.lengths.data() + row;
      call.sequences = run.blocks;
      decoder(run.blocks, run.longest)(call);
    } else {
      ExactPrefill call;
      describe(call);
      call.queries = queries_.data();
      call.out = attended_.data();
      call.of_block = batch.blocks.data() + run.first_block;
      call.blocks = run.blocks;
      call.longest = static_cast<int>(run.longest);
      exact_prefill(call);
    }
  }
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

void LlamaDevice::hand_over(int layer, std::span<const Block> batch, int64_t rows) {
  const int64_t q = int64_t{facts_.q_heads} * facts_.head_dim, kv = int64_t{facts_.kv_heads} * facts_.head_dim;
  const ConstMatrix all(static_cast<const float*>(tapped_[layer % 2]->wait()), rows, q + 2 * kv);
  int64_t first = 0;
  for (const Block& b : batch) {
    const ConstMatrix x = all.slice_rows(first, std::ssize(b.tokens));
    if (b.tap)
      b.tap->on_qkv(layer, length(b.sequence), x.slice_cols(0, q), x.slice_cols(q, kv), x.slice_cols(q + kv, kv));
    first += std::ssize(b.tokens);
  }
}

void LlamaDevice::forward(std::span<const Block> batch, LogitRows rows, MutMatrix logits) {
  std::vector<int32_t> tokens, sequence, position, lengths, lasts;
  std::vector<float> rotation;
  std::vector<PrefillBlock> blocks;
  Attention attention;
  for (const Block& b : batch) {
    VQKV_CHECK(b.sequence >= 0 && b.sequence < std::ssize(length_));
    VQKV_CHECK(std::ranges::count(batch, b.sequence, &Block::sequence) == 1);
    const int64_t held = length(b.sequence), end = held + static_cast<int64_t>(b.tokens.size());
    VQKV_CHECK(!b.tokens.empty());
    if (end > int64_t{most_pages_} * kDevicePageTokens)
      fail_usage(fmt::format("sequence {} would hold {} tokens; its cache on the device has room for {}", b.sequence,
                             end, int64_t{most_pages_} * kDevicePageTokens));
    facts_.require_context(end);
    const bool step = b.tokens.size() == 1;
    const auto first_row = static_cast<int>(tokens.size());
    if (attention.runs.empty() || attention.runs.back().steps != step)
      attention.runs.push_back({step, static_cast<int>(blocks.size()), 0, first_row, 0});
    Attention::Run& run = attention.runs.back();
    ++run.blocks;
    run.longest = std::max(run.longest, step ? end : std::ssize(b.tokens));
    blocks.push_back({first_row, static_cast<int32_t>(b.tokens.size()), static_cast<int32_t>(held), b.sequence});
    for (int64_t at = held; at < end; ++at) {
      const int32_t token = b.tokens[static_cast<size_t>(at - held)];
      if (token < 0 || token >= facts_.vocab)
        fail_usage(fmt::format("token id {} is not in the vocabulary of {} (allowed: 0 to {})", token, facts_.name,
                               facts_.vocab - 1));
      tokens.push_back(token);
      sequence.push_back(b.sequence);
      position.push_back(static_cast<int32_t>(at));
      lengths.push_back(static_cast<int32_t>(at + 1));
      rotation.insert(rotation.end(), rope_.row(at), rope_.row(at) + facts_.rope.rotary_dim);
    }
    lasts.push_back(static_cast<int32_t>(tokens.size()) - 1);
  }
  if (tokens.empty()) return;
  const int n = static_cast<int>(tokens.size()), hidden = facts_.hidden, ffn = facts_.ffn, d = facts_.head_dim,
            q_cols = facts_.q_heads * d, qkv_cols = q_cols + 2 * facts_.kv_heads * d;
  const int64_t wanted = rows == LogitRows::kAll ? n : std::ssize(batch);
  VQKV_CHECK(rows == LogitRows::kNone || (logits.rows == wanted && logits.cols == facts_.vocab));
  make_room(n);
  if (rows != LogitRows::kNone && wanted > logits_room_) {
    logits_ = Buffer<float>(static_cast<size_t>(wanted) * static_cast<size_t>(facts_.vocab), "logits");
    logits_room_ = wanted;
  }
  const bool tapped = std::ranges::any_of(batch, [](const Block& b) { return b.tap != nullptr; });
  const size_t tapped_bytes = static_cast<size_t>(n) * static_cast<size_t>(qkv_cols) * sizeof(float);
  if (tapped && (!tapped_[0] || tapped_[0]->bytes() < tapped_bytes))
    for (auto& copy : tapped_) copy = std::make_unique<device::HostCopy>(tapped_bytes, "rows for taps");
  const Buffer<int32_t> ids(std::span<const int32_t>(tokens), "tokens"),
      at(std::span<const int32_t>(position), "positions");
  attention.blocks = Buffer<PrefillBlock>(std::span<const PrefillBlock>(blocks), "blocks");
  attention.sequences = Buffer<int32_t>(std::span<const int32_t>(sequence), "sequences");
  attention.lengths = Buffer<int32_t>(std::span<const int32_t>(lengths), "lengths");
  const Buffer<float> turns(std::span<const float>(rotation), "rotation");

  const auto eps = static_cast<float>(facts_.norm_eps);
  embed_rows(ids.data(), embedding_.data(), n, hidden, stream_.data());
  for (int l = 0; l < facts_.layers; ++l) {
    const Layer& layer = layers_[static_cast<size_t>(l)];
    norm_rows_bf16(stream_.data(), layer.attention_norm.data(), eps, n, hidden, rounded_.data());
    device::multiply_rows_bf16(rounded_.data(), layer.qkv.data(), n, qkv_cols, hidden, false, qkv_.data());
    const size_t of_layer = keys_.size() / static_cast<size_t>(facts_.layers) * static_cast<size_t>(l);
    QkvRows place;
    place.qkv = qkv_.data();
    place.bias = layer.qkv_bias.data();
    place.q_norm = layer.q_norm.data();
    place.k_norm = layer.k_norm.data();
    place.norm_eps = eps;
    place.rotation = turns.data();
    place.rows = n;
    place.q_heads = facts_.q_heads;
    place.kv_heads = facts_.kv_heads;
    place.head_dim = d;
    place.rotary_dim = facts_.rope.rotary_dim;
    place.query_scale = static_cast<float>(std::numbers::log2e / std::sqrt(static_cast<double>(d)));
    place.queries = queries_.data();
    place.keys = keys_.data() + of_layer;
    place.values = values_.data() + of_layer;
    place.page_table = pages_.data();
    place.sequence = attention.sequences.data();
    place.position = at.data();
    place.most_pages = most_pages_;
    place.page_tokens = kDevicePageTokens;
    place_qkv_rows(place);
    if (tapped) tapped_[l % 2]->start(qkv_.data(), tapped_bytes);
    attend(l, attention);
    round_rows_bf16(attended_.data(), int64_t{n} * q_cols, rounded_.data());
    device::multiply_rows_bf16(rounded_.data(), layer.out.data(), n, hidden, q_cols, true, stream_.data());
    if (layer.o_bias.size() > 0) add_bias_rows(stream_.data(), layer.o_bias.data(), n, hidden);
    norm_rows_bf16(stream_.data(), layer.ffn_norm.data(), eps, n, hidden, rounded_.data());
    device::multiply_rows_bf16(rounded_.data(), layer.gate_up.data(), n, 2 * ffn, hidden, false, wide_.data());
    swiglu_rows_bf16(wide_.data(), n, ffn, rounded_.data());
    device::multiply_rows_bf16(rounded_.data(), layer.down.data(), n, hidden, ffn, true, stream_.data());
    if (tapped && l > 0) hand_over(l - 1, batch, n);  // with this layer on its way
  }
  if (tapped) hand_over(facts_.layers - 1, batch, n);
  for (const Block& b : batch) length_[static_cast<size_t>(b.sequence)] += static_cast<int64_t>(b.tokens.size());
  if (rows == LogitRows::kNone) return;
  norm_rows_bf16(stream_.data(), final_norm_.data(), eps, n, hidden, rounded_.data());
  const uint16_t* head = facts_.tied_head ? embedding_.data() : own_head_.data();
  const auto vocab = static_cast<size_t>(facts_.vocab);
  if (rows == LogitRows::kAll)
    device::multiply_rows_bf16(rounded_.data(), head, n, facts_.vocab, hidden, false, logits_.data());
  else
    for (size_t b = 0; b < batch.size(); ++b)
      device::multiply_rows_bf16(rounded_.data() + static_cast<size_t>(lasts[b]) * static_cast<size_t>(hidden), head, 1,
                                 facts_.vocab, hidden, false, logits_.data() + b * vocab);
  for (int64_t r = 0; r < wanted; ++r)
    device::copy_out(logits.row(r), logits_.data() + static_cast<size_t>(r) * vocab, vocab * sizeof(float));
}

}  // namespace vqkv
