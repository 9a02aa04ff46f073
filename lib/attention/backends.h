// The backends of this folder; make_attention_backend gives them by name.
#pragma once
#include <memory>

#include "attention/attention.h"

namespace vqkv {

std::unique_ptr<AttentionBackend> make_reference_backend();
std::unique_ptr<AttentionBackend> make_reconstruct_backend();

}  // namespace vqkv
