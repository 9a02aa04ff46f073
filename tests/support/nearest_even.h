// Rounding said once more, by distances instead of bit tricks, for tests of what is stored.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>

namespace vqkv::test {

// Bits of the bf16 nearest to a float that is not NaN; of two as near, the even one. Differences of neighbours are
// exact in double.
inline uint16_t nearest_even_bf16(float v) {
  const auto below = static_cast<uint16_t>(std::bit_cast<uint32_t>(v) >> 16);  // towards zero
  const auto value = [](uint16_t bits) { return static_cast<double>(std::bit_cast<float>(uint32_t{bits} << 16)); };
  if (!std::isfinite(v) || value(below) == static_cast<double>(v)) return below;
  const auto above = static_cast<uint16_t>(below + 1);
  const double down = std::fabs(static_cast<double>(v) - value(below)),
               up = std::fabs(value(above) - static_cast<double>(v));
  return down < up || (down == up && below % 2 == 0) ? below : above;
}

}  // namespace vqkv::test
