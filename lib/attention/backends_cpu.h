// The backends of this folder; make_attention_backend gives them by name.
#pragma once
#include <memory>

#include "attention/attention.h"

namespace vqkv {

// How logits of coded keys are found: from decoded keys, or from tables in the forms that scan_cpu.h names.
enum class KeyScan { kNone, kFixed, kBytes };
// Whether values are summed by code (code_sums_cpu.h) instead of decoded. kAlways is for tests and timings: from the
// first coded token on, in short segments.
enum class ValueSums { kNever, kWherePays, kAlways };

std::unique_ptr<AttentionBackend> make_reference_backend();
std::unique_ptr<AttentionBackend> make_tiled_backend(KeyScan scan, ValueSums sums);
std::unique_ptr<AttentionBackend> make_auto_backend();

// Why keys of this plan can't be scored by table scans, or nothing.
std::optional<std::string> table_scan_reason(const DecodePlan& plan);
// Why rows of this plan can't be attended in the code domain, or nothing: all that keeps values from being summed by
// code.
std::optional<std::string> code_domain_reason(const DecodePlan& plan);

}  // namespace vqkv
