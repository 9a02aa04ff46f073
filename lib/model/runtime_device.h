// ModelRuntime on a device, over sessions of that device (model/session_device.h).
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "model/llama_device.h"
#include "model/model_files.h"
#include "model/runtime.h"

namespace vqkv {

class DeviceRuntime final : public ModelRuntime {
 public:
  static constexpr int64_t kMostRows = 4096;  // bounds activations, however long the blocks
  // A GGUF file or a Hugging Face folder. kUnavailable without a device, kBadData as load_model, kUsage for a head_dim
  // without a kernel and where memory is too little.
  explicit DeviceRuntime(const std::string& path);
  const ModelFacts& facts() const override { return llama_.facts(); }
  std::string weights() const override { return "bf16 x bf16"; }
  const Tokenizer& tokenizer() const override;
  // In passes of up to kMostRows rows: each sequence's next tokens that see the same codes, products over all of them,
  // attention for each alone.
  void forward_batch(std::span<const SequenceBlock> batch, LogitRows rows, MutMatrix logits) override;
  ConstMatrix output_weight(int layer) const override;
  int64_t weight_bytes() const override { return llama_.weight_bytes(); }

 private:
  std::string path_;
  std::unique_ptr<ModelWeights> weights_;
  LlamaDevice llama_;
  QkvToHost to_host_;
  mutable std::unique_ptr<Tokenizer> tokenizer_;  // when it is first asked for
  mutable std::vector<Matrix<float>> output_;     // likewise
};

}  // namespace vqkv
