#include "attention/scan.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cache/kernels.h"
#include "core/cpu.h"

namespace vqkv::scan {
namespace {
constexpr float kWidest = 1e30f;  // slot range; beyond it, steps and sums could overflow
}  // namespace

void quantize(const float* lut, int64_t slots, int64_t entries, int64_t stride, FixedTables& out) {
  VQKV_CHECK(entries <= kEntries && slots <= kMaxSlots);
  out.low_byte.assign(static_cast<size_t>(slots * kEntries), 0);
  out.high_byte.assign(static_cast<size_t>(slots * kEntries), 0);
  float range = 0;
  double base = 0;
  std::vector<float> lows(static_cast<size_t>(slots));
  for (int64_t s = 0; s < slots; ++s) {
    const auto [low, high] = std::minmax_element(lut + s * stride, lut + s * stride + entries);
    lows[static_cast<size_t>(s)] = *low;
    base += *low;
    range = std::max(range, *high - *low);
  }
  out.base = static_cast<float>(base);
  out.step = range / 65535.0f;
  out.bound = static_cast<float>(slots) * out.step * 0.5f;
  if (!(range < kWidest)) out.bound = std::numeric_limits<float>::infinity();
  if (range == 0.0f || !(range < kWidest)) return;
  const float inverse = 65535.0f / range;
  for (int64_t s = 0; s < slots; ++s) {
    for (int64_t e = 0; e < entries; ++e) {
      const float q = (lut[s * stride + e] - lows[static_cast<size_t>(s)]) * inverse + 0.5f;
      const auto code = static_cast<int32_t>(std::min(65535.0f, q));  // 65535 for NaN, which the base then carries
      out.low_byte[static_cast<size_t>(s * kEntries + e)] = static_cast<uint8_t>(code & 0xff);
      out.high_byte[static_cast<size_t>(s * kEntries + e)] = static_cast<uint8_t>(code >> 8);
    }
  }
}

void quantize(const float* lut, int64_t slots, int64_t entries, int64_t stride, ByteTables& out) {
  VQKV_CHECK(entries <= kEntries && slots <= kMaxSlots);
  out.bytes.assign(static_cast<size_t>(slots * kEntries), 0);
  std::vector<float> lows(static_cast<size_t>(slots));
  float range = 0;
  for (int64_t s = 0; s < slots; ++s) {
    const auto [low, high] = std::minmax_element(lut + s * stride, lut + s * stride + entries);
    lows[static_cast<size_t>(s)] = *low;
    range = std::max(range, *high - *low);
  }
  out.bound = std::numeric_limits<float>::infinity();
  if (!(range < kWidest)) return;
  out.step = range / 255.0f;
  double base = 0, bound = 0;
  const float inverse = range > 0 ? 255.0f / range : 0.0f;
  for (int64_t s = 0; s < slots; ++s) {
    const float low = lows[static_cast<size_t>(s)];
    float under = 0, over = 0;  // extremes of the rounding error; their middle goes to the base
    for (int64_t e = 0; e < entries; ++e) {
      const float x = lut[s * stride + e] - low;
      const auto code = static_cast<int32_t>(std::min(255.0f, x * inverse + 0.5f));
      out.bytes[static_cast<size_t>(s * kEntries + e)] = static_cast<uint8_t>(code);
      const float error = x - static_cast<float>(code) * out.step;
      under = std::min(under, error);
      over = std::max(over, error);
    }
    base += low + 0.5 * (static_cast<double>(under) + over);
    bound += 0.5 * (static_cast<double>(over) - under);
  }
  out.base = static_cast<float>(base);
  out.bound = static_cast<float>(bound);
}

bool fixed_available() { return cpu_features().avx512_vbmi; }

void fixed(const FixedTables& tables, const uint8_t* const* runs, int64_t count, int64_t slots, float* out) {
  if (fixed_available())
    fixed_vbmi(tables, runs, count, slots, out);
  else
    fixed_portable(tables, runs, count, slots, out);
}

void bytes(const ByteTables& tables, const uint8_t* const* runs, int64_t count, int64_t slots, float* out) {
  if (fixed_available())
    bytes_vbmi(tables, runs, count, slots, out);
  else
    bytes_portable(tables, runs, count, slots, out);
}

void bytes_portable(const ByteTables& tables, const uint8_t* const* runs, int64_t count, int64_t slots, float* out) {
  for (int64_t n = 0; n < count; ++n)
    for (int64_t t = 0; t < kRun; ++t) {
      int32_t sum = 0;
      for (int64_t s = 0; s < slots; ++s)
        sum += tables.bytes[static_cast<size_t>(s * kEntries + runs[n][s * kRun + t])];
      out[n * kRun + t] = std::fma(static_cast<float>(sum), tables.step, tables.base);
    }
}

void fixed_portable(const FixedTables& tables, const uint8_t* const* runs, int64_t count, int64_t slots, float* out) {
  for (int64_t n = 0; n < count; ++n)
    for (int64_t t = 0; t < kRun; ++t) {
      int32_t sum = 0;
      for (int64_t s = 0; s < slots; ++s) {
        const auto at = static_cast<size_t>(s * kEntries + runs[n][s * kRun + t]);
        sum += 256 * tables.high_byte[at] + tables.low_byte[at];
      }
      out[n * kRun + t] = std::fma(static_cast<float>(sum), tables.step, tables.base);
    }
}

void plain(const float* lut, int64_t stride, const uint16_t* codes, int64_t slots, float* out) {
  std::fill_n(out, kRun, 0.0f);
  for (int64_t s = 0; s < slots; ++s)
    kernels::decode_levels(codes + s * kRun, kRun, lut + s * stride, 0.0f, nullptr, nullptr, out, true);
}

}  // namespace vqkv::scan
