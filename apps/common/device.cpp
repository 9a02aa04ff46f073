#include "common/device.h"

#include "attention/provided.h"
#include "core/error.h"

namespace vqkv {

std::string DeviceChoice::require() const {
  if (on_cpu()) return name;
  if (weights == "f32") fail_usage("--weights f32: weights on a device are bf16");
  if (!forms)
    fail_unavailable(
        "--device cuda: this program was built without CUDA; cmake builds it in where nvcc is (VQKV_CUDA=ON says what "
        "is missing), and --device cpu needs neither");
  return forms->require_device();
}

std::unique_ptr<ModelRuntime> DeviceChoice::open(const std::string& model) const {
  require();
  if (!on_cpu()) {
    provide_attention_backend(kDeviceAttention, [own = forms] { return own->attention(); });
    return forms->runtime(model);
  }
  return load_model(model, {.weights = dtype_from_name(cpu_weights())});
}

}  // namespace vqkv
