#pragma once
#include <cstddef>
#include <cstdint>

namespace vqkv {

// A row, channel or token (>= 0) as the index of a standard container.
constexpr size_t at(int64_t i) { return static_cast<size_t>(i); }

}  // namespace vqkv
