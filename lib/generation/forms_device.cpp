#include "generation/device_forms.h"
#include "model/runtime_device.h"
#include "model/session_device.h"

namespace vqkv {
namespace {

class LinkedForms final : public DeviceForms {
 public:
  std::string require_device() const override { return device::require_device(); }
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
