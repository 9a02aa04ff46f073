// What tools do on a device. A program has it where the kernels of one are linked; the tools of others say that they
// have none.
#pragma once
#include <cstdint>
#include <memory>
#include <string>

#include "generation/capture.h"

namespace vqkv {

class DeviceForms {
 public:
  virtual ~DeviceForms() = default;
  // The device's name. kUnavailable with the reason where there is none.
  virtual std::string require_device() const = 0;
  // Reads windows of up to `context` tokens with weights and inputs of products in bf16. kBadData and kUsage as
  // load_model, and where the device has no room.
  virtual std::unique_ptr<CaptureModel> capture_model(const std::string& path, int64_t context) const = 0;
  // A runtime of such weights, over sessions of `attention`; errors likewise.
  virtual std::unique_ptr<ModelRuntime> runtime(const std::string& path) const = 0;
  // Makes sessions of caches there, and refuses (kUnavailable) those that it has no form of.
  virtual std::unique_ptr<AttentionBackend> attention() const = 0;
};

// Those of the kernels that a program links, on a CUDA device or emulated.
const DeviceForms& linked_device_forms();

}  // namespace vqkv
