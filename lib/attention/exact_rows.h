// The tokens of a sequence that a coded cache keeps exact, sinks and window, on a device.
#pragma once
#include <cstdint>

namespace vqkv {

inline constexpr int kDevicePageTokens = 64;

// Rows in f16, keys rotated, in pages: in whatever order, since attention is a sum over tokens.
struct ExactRows {
  const uint16_t* keys = nullptr;  // (pages, kv_heads, kDevicePageTokens, head_dim)
  const uint16_t* values = nullptr;
  const int32_t* page_table = nullptr;  // (sequences, most_pages)
  const int32_t* lengths = nullptr;     // (sequences): tokens; null: none are exact
  int most_pages = 0;
};

}  // namespace vqkv
