// Exact caches of several sequences on a device, attended together: bf16 rows in pages.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "model/llama_device.h"

namespace vqkv {

class ExactDecoder;

class ExactCaches final : public DeviceAttention {
 public:
  // Of `sequences`, of up to `tokens` each: the memory is taken whole, kUsage where there is too little.
  ExactCaches(LlamaDevice& model, int sequences, int64_t tokens);
  ~ExactCaches() override;

  int64_t length(int sequence) const { return length_.at(static_cast<size_t>(sequence)); }
  // Forgets all behind the first `tokens`.
  void truncate(int sequence, int64_t tokens);

  // New tokens of a sequence, at positions [length(), ...). A tap sees rows of one layer while the device is at the
  // next.
  struct Block {
    int sequence = 0;
    std::span<const int32_t> tokens;
    ModelTap* tap = nullptr;
  };
  // Causal, as ModelRuntime::forward_batch, each sequence at most once: logits (rows, vocab) of all tokens, of each
  // block's last, or none. kUsage for tokens outside the vocabulary and beyond the room.
  void forward(std::span<const Block> batch, LogitRows rows, MutMatrix logits);

  void attend(int layer, QkvRows rows, float* out) override;
  void launched(int layer) override;

 private:
  struct Batch;
  ExactDecoder& decoder(int sequences, int64_t longest);
  void hand_over(int layer);  // rows of a layer, as they arrive, to the taps of the batch

  LlamaDevice& model_;
  const ModelFacts& facts_;
  int most_pages_;
  std::vector<int64_t> length_;
  device::Buffer<int32_t> pages_;           // (sequences, most_pages)
  device::Buffer<uint16_t> keys_, values_;  // (layers, pages, kv_heads, page, head_dim)
  QkvToHost to_host_;
  std::unique_ptr<ExactDecoder> decoder_;
  int decoder_rows_ = 0, decoder_splits_ = 0;
  std::unique_ptr<Batch> batch_;  // that is attended
};

}  // namespace vqkv
