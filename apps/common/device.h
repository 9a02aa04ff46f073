// Where a tool runs a model: on the CPU, or on a device whose kernels the program links.
#pragma once
#include <memory>
#include <string>

#include "generation/device_forms.h"
#include "model/runtime.h"

namespace vqkv {

struct DeviceChoice {
  std::string name = "cpu";            // or cuda
  std::string weights;                 // f32 or bf16; empty: f32 on the CPU, bf16 on a device
  const DeviceForms* forms = nullptr;  // of this program; null: it has no kernels

  bool on_cpu() const { return name == "cpu"; }
  std::string cpu_weights() const { return weights.empty() ? "f32" : weights; }
  // What runs, by name. kUnavailable without the device, kUsage for weights that it does not take: before anything is
  // read.
  std::string require() const;
  std::unique_ptr<ModelRuntime> open(const std::string& model) const;
};

}  // namespace vqkv
