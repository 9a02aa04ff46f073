// The Llama family on a device: bf16 weights, fp32 sums. Host code of device/runtime.h: what it launches runs on a CUDA
// device or emulated, whichever a program links.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "core/rope.h"
#include "device/runtime.h"
#include "model/llama_rows.h"
#include "model/runtime.h"

namespace vqkv {

class ModelWeights;

// What attends in each layer, to a cache on the device.
class DeviceAttention {
 public:
  virtual ~DeviceAttention() = default;
  // `rows` has all but where keys and values go: puts them there (place_qkv_rows) and attends.
  // out (rows, q_heads * head_dim).
  virtual void attend(int layer, QkvRows rows, float* out) = 0;
  // All of the layer is on its way.
  virtual void launched(int) {}
};

// Rows of the product with W_Q, W_K and W_V, biased and normed, on their way to the host: those of two layers at once.
class QkvToHost {
 public:
  explicit QkvToHost(const CacheShape& shape) : cols_((shape.q_heads + 2 * shape.kv_heads) * shape.head_dim) {}
  void start(int layer, const QkvRows& rows);
  // (rows, (q_heads + 2 kv_heads) * head_dim), once they are there; until that layer's next but one starts.
  ConstMatrix wait(int layer);

 private:
  int64_t cols_, rows_ = 0;
  std::unique_ptr<device::HostCopy> copies_[2];
};

class LlamaDevice {
 public:
  // Weights go to the device once. kUsage for a head_dim without a kernel, and where the device's memory is too little.
  explicit LlamaDevice(const ModelWeights& weights);
  ~LlamaDevice();

  const ModelFacts& facts() const { return facts_; }
  int64_t weight_bytes() const;  // ModelRuntime::weight_bytes
  // One pass over rows of any sequences. logits (wanted.size(), vocab): of those rows, ascending. kUsage for tokens
  // outside the vocabulary.
  void forward(std::span<const int32_t> tokens, std::span<const int32_t> positions, DeviceAttention& attention,
               std::span<const int32_t> wanted, MutMatrix logits);

 private:
  struct Layer;
  void make_room(int64_t rows);

  ModelFacts facts_;
  RopeTable rope_;
  std::vector<Layer> layers_;
  device::Buffer<uint16_t> embedding_, own_head_;
  device::Buffer<float> final_norm_;
  // Activations of as many rows as the largest pass yet.
  int64_t room_ = 0, logits_room_ = 0;
  device::Buffer<float> stream_, qkv_, queries_, attended_, wide_, logits_;
  device::Buffer<uint16_t> rounded_;
};

}  // namespace vqkv
