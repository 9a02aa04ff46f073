// The reference runtime on a device: bf16 weights, fp32 sums, several sequences over exact rows of bf16 in pages. Host
// code of device/runtime.h: what it launches runs on a CUDA device or emulated, whichever a program links.
#pragma once
#include <memory>
#include <span>
#include <vector>

#include "core/rope.h"
#include "device/runtime.h"
#include "model/runtime.h"

namespace vqkv {

class ModelWeights;
class ExactDecoder;

class LlamaDevice {
 public:
  // Weights go to the device once; a cache of `sequences`, of up to `tokens` each, is taken whole. kUsage for a
  // head_dim without a kernel, and where the device's memory is too little.
  LlamaDevice(const ModelWeights& weights, int sequences, int64_t tokens);
  ~LlamaDevice();

  const ModelFacts& facts() const { return facts_; }
  int64_t length(int sequence) const { return length_.at(static_cast<size_t>(sequence)); }
  void clear(int sequence) { length_.at(static_cast<size_t>(sequence)) = 0; }

  // New tokens of a sequence, at positions [length(), ...). A tap sees rows of one layer while the device is at the
  // next.
  struct Block {
    int sequence = 0;
    std::span<const int32_t> tokens;
    ModelTap* tap = nullptr;
  };
  // Causal, as ModelRuntime::forward_batch, each sequence at most once: logits (rows, vocab) of all tokens, of each
  // block's last, or none. kUsage for tokens outside the vocabulary and beyond the cache.
  void forward(std::span<const Block> batch, LogitRows rows, MutMatrix logits);

 private:
  struct Layer;
  struct Attention;  // of one batch
  void attend(int layer, const Attention& batch);
  void make_room(int64_t rows);
  // Rows of a layer, as they arrive, to the taps of a batch.
  void hand_over(int layer, std::span<const Block> batch, int64_t rows);
  ExactDecoder& decoder(int sequences, int64_t longest);

  ModelFacts facts_;
  RopeTable rope_;
  int most_pages_;
  std::vector<int64_t> length_;
  std::vector<Layer> layers_;
  device::Buffer<uint16_t> embedding_, own_head_;
  device::Buffer<float> final_norm_;
  device::Buffer<int32_t> pages_;           // (sequences, most_pages)
  device::Buffer<uint16_t> keys_, values_;  // (layers, pages, kv_heads, page, head_dim)
  // Activations of as many rows as the largest block yet.
  int64_t room_ = 0, logits_room_ = 0;
  device::Buffer<float> stream_, qkv_, queries_, attended_, wide_, logits_;
  device::Buffer<uint16_t> rounded_;
  std::unique_ptr<device::HostCopy> tapped_[2];  // layers in turns
  std::unique_ptr<ExactDecoder> decoder_;
  int decoder_rows_ = 0, decoder_splits_ = 0;
};

}  // namespace vqkv
