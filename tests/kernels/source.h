// Where tests of kernels find the repository: a program that was built elsewhere is told by VQKV_SOURCE.
#pragma once
#include <cstdlib>
#include <filesystem>
#include <string>

#include "support/catch.h"

namespace vqkv {

inline const std::string kSource = std::getenv("VQKV_SOURCE") ? std::getenv("VQKV_SOURCE") : VQKV_SOURCE_DIR;

// The real small model; "" elsewhere without it, since a bundle for another machine leaves it out.
inline std::string small_model() {
  const std::string path = kSource + "/data/models/SmolLM2-135M-Instruct.Q4_1.gguf";
  if (!std::getenv("VQKV_SOURCE") || std::filesystem::exists(path)) return path;
  WARN(path << " is not there: nothing is said of it");
  return "";
}

}  // namespace vqkv
