// What tools do on a device. A program has it where the kernels of one are linked; the tools of others say that they
// have none.
#pragma once
#include <memory>
#include <string>

#include "attention/attention.h"
#include "model/runtime.h"

namespace vqkv {

class DeviceForms {
 public:
  virtual ~DeviceForms() = default;
  // The device's name. kUnavailable with the reason where there is none.
  virtual std::string require_device() const = 0;
  // Of weights and inputs of products in bf16, over sessions of `attention`. kBadData and kUsage as load_model, and
  // where the device has no room.
  virtual std::unique_ptr<ModelRuntime> runtime(const std::string& path) const = 0;
  // Makes sessions of caches there, and refuses (kUnavailable) those that it has no form of.
  virtual std::unique_ptr<AttentionBackend> attention() const = 0;
};

// Those of the kernels that a program links, on a CUDA device or emulated.
const DeviceForms& linked_device_forms();

}  // namespace vqkv
