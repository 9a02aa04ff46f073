// For code that has a GGUF file open already.
#pragma once
#include <memory>

#include "io/gguf.h"
#include "model/tokenizer_data.h"

namespace vqkv {

TokenizerData tokenizer_data_from_gguf(const GgufFile& file);
std::unique_ptr<Tokenizer> tokenizer_from_gguf(const GgufFile& file);

}  // namespace vqkv
