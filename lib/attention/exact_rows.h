// Exact rows of tokens in pages, on a device.
#pragma once
#include <cstdint>
#include <string>
#include <type_traits>
#include <utility>

#include "core/error.h"

namespace vqkv {

inline constexpr int kDevicePageTokens = 64;

// call(std::integral_constant<int, head_dim>), of the head_dims that attention over exact rows is compiled for. kUsage
// for any other.
template <class Call>
void at_head_dim(int head_dim, Call call) {
  std::string known;
  const auto among = [&]<int... kDims>(std::integer_sequence<int, kDims...>) {
    const bool found = ((head_dim == kDims && (call(std::integral_constant<int, kDims>()), true)) || ...);
    if (!found) ((known += (known.empty() ? "" : ", ") + std::to_string(kDims)), ...);
    return found;
  };
  if (!among(std::integer_sequence<int, 8, 16, 32, 64, 80, 96, 128>()))
    fail_usage("attention on a device: head_dim " + std::to_string(head_dim) + "; kernels are compiled for " + known);
}

// The tokens of a sequence that a coded cache keeps exact, sinks and window. Rows in f16, keys rotated, in pages: in
// whatever order, since attention is a sum over tokens.
struct ExactRows {
  const uint16_t* keys = nullptr;  // (pages, kv_heads, kDevicePageTokens, head_dim)
  const uint16_t* values = nullptr;
  const int32_t* page_table = nullptr;  // (sequences, most_pages)
  const int32_t* lengths = nullptr;     // (sequences): tokens; null: none are exact
  int most_pages = 0;
};

}  // namespace vqkv
