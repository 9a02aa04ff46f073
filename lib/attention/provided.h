// Backends of devices, by name: a program that links one provides it, and make_attention_backend finds it.
#pragma once
#include <functional>
#include <memory>
#include <string>

#include "attention/attention.h"

namespace vqkv {

inline constexpr const char* kDeviceAttention = "cuda";

// Before anything asks for it; the last one that provides a name has it.
void provide_attention_backend(const std::string& name, std::function<std::unique_ptr<AttentionBackend>()> make);

}  // namespace vqkv
