#include <fmt/format.h>

#include "core/error.h"
#include "generation/device_forms.h"
#include "model/exact_caches_device.h"
#include "model/model_files.h"
#include "model/runtime_device.h"
#include "model/session_device.h"

namespace vqkv {
namespace {

class CaptureOnDevice final : public CaptureModel {
 public:
  CaptureOnDevice(const std::string& path, int64_t context)
      : weights_(ModelWeights::open(path)), runtime_(*weights_), cache_(runtime_, 1, context) {}
  const ModelFacts& facts() const override { return runtime_.facts(); }
  std::string weights() const override { return "bf16 x bf16"; }
  void read(std::span<const int32_t> window, ModelTap& tap) override {
    cache_.truncate(0, 0);
    const ExactCaches::Block block[] = {{0, window, &tap}};
    cache_.forward(block, LogitRows::kNone, {});
  }
  double backward(std::span<const int32_t>, LogitLoss&, GradientTap&) override {
    fail_unavailable("a device has no backward pass: --device cpu records gradients");
  }
  ConstMatrix output_weight(int layer) override {
    output_ = weights_->read(Weight::kO, layer);
    return output_;
  }

 private:
  std::unique_ptr<ModelWeights> weights_;
  LlamaDevice runtime_;
  ExactCaches cache_;
  Matrix<float> output_;
};

class LinkedForms final : public DeviceForms {
 public:
  std::string require_device() const override { return device::require_device(); }
  std::unique_ptr<CaptureModel> capture_model(const std::string& path, int64_t context) const override {
    return std::make_unique<CaptureOnDevice>(path, context);
  }
  std::unique_ptr<ModelRuntime> runtime(const std::string& path) const override {
    return std::make_unique<DeviceRuntime>(path);
  }
  std::unique_ptr<AttentionBackend> attention() const override { return std::make_unique<DeviceBackend>(); }
};

}  // namespace

const DeviceForms& linked_device_forms() {
  static const LinkedForms forms;
  return forms;
}

}  // namespace vqkv
