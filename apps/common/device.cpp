#include "common/device.h"

#include <CLI/CLI.hpp>

#include "core/error.h"

namespace vqkv {

void DeviceChoice::add_to(CLI::App& verb) {
  verb.add_option("--device", name, "cpu, or cuda: weights and inputs of products in bf16, sums in fp32")
      ->capture_default_str()
      ->check(CLI::IsMember({"cpu", "cuda"}));
}

void DeviceChoice::add_weights_to(CLI::App& verb) {
  verb.add_option("--weights", weights,
                  "f32, or bf16: half the bytes; with fast bf16 products (AVX512-BF16 of AMD) inputs are rounded too")
      ->default_str("f32")
      ->check(CLI::IsMember({"f32", "bf16"}));
}

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
  if (!on_cpu()) return forms->runtime(model);
  return load_model(model, {.weights = dtype_from_name(cpu_weights())});
}

}  // namespace vqkv
