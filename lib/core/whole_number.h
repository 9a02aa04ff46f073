#pragma once
#include <cstdint>
#include <optional>

#include "core/json_fwd.h"

namespace vqkv {

// The integer that a number means: 4, 4.0 and 4e0 are one value wherever whole numbers are asked for. Nothing for
// anything else, and for a float beyond 2^53, which no longer names one integer.
std::optional<int64_t> whole_number(const Json& value);

}  // namespace vqkv
