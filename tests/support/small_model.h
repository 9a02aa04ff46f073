// The real small model of data/models.
#pragma once
#include <string>

namespace vqkv {

inline const std::string kModel = VQKV_SOURCE_DIR "/data/models/SmolLM2-135M-Instruct.Q4_1.gguf";

}  // namespace vqkv
