// The backends of this folder; make_attention_backend gives them by name.
#pragma once
#include <memory>

#include "attention/attention.h"

namespace vqkv {

std::unique_ptr<AttentionBackend> make_reference_backend();
std::unique_ptr<AttentionBackend> make_reconstruct_backend();
std::unique_ptr<AttentionBackend> make_table_backend();
std::unique_ptr<AttentionBackend> make_table8_backend();
std::unique_ptr<AttentionBackend> make_auto_backend();

// Why keys of this plan can't be scored by table scans, or nothing.
std::optional<std::string> table_scan_reason(const DecodePlan& plan);

}  // namespace vqkv
