// Are all values finite?
#pragma once
#include <bit>
#include <cstdint>

namespace vqkv {

// As integers (an exponent of all ones is an infinity or NaN) the compiler tests many at once; std::isfinite one by
// one.
inline bool all_finite(const float* x, int64_t n) {
  uint32_t bad = 0;
  for (int64_t i = 0; i < n; ++i) bad |= (std::bit_cast<uint32_t>(x[i]) & 0x7f800000u) == 0x7f800000u;
  return bad == 0;
}

// Index of the first value that is not, or -1.
inline int64_t first_not_finite(const float* x, int64_t n) {
  if (all_finite(x, n)) return -1;
  int64_t i = 0;
  while (all_finite(x + i, 1)) ++i;
  return i;
}

}  // namespace vqkv
