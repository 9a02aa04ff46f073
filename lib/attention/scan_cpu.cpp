#include "attention/scan_cpu.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "attention/kernels_cpu.h"
#include "core/cpu.h"

namespace vqkv::scan {
namespace {
constexpr float kWidest = 1e30f;  // slot range; beyond it, steps and sums could overflow

// The lowest entry of each slot, and the widest range of a slot.
std::pair<std::vector<float>, float> lowest(const float* lut, int64_t slots, int64_t entries, int64_t stride) {
  std::vector<float> lows(static_cast<size_t>(slots));
  float range = 0;
  for (int64_t s = 0; s < slots; ++s) {
    float high = 0;
    kernels::value_range(lut + s * stride, entries, &lows[static_cast<size_t>(s)], &high);
    range = std::max(range, high - lows[static_cast<size_t>(s)]);
  }
  return {std::move(lows), range};
}

}  // namespace

void quantize(const float* lut, int64_t slots, int64_t entries, int64_t stride, FixedTables& out) {
  VQKV_CHECK(entries <= kEntries && slots <= kMaxSlots);
  out.entries = entries;
  out.low_byte.assign(static_cast<size_t>(slots * kEntries), 0);
  out.high_byte.assign(static_cast<size_t>(slots * kEntries), 0);
  double base = 0;
  const auto [lows, range] = lowest(lut, slots, entries, stride);
  for (const float low : lows) base += low;
  out.base = static_cast<float>(base);
  out.step = range / 65535.0f;
  out.bound = static_cast<float>(slots) * out.step * 0.5f;
  if (!(range < kWidest)) out.bound = std::numeric_limits<float>::infinity();
  if (range == 0.0f || !(range < kWidest)) return;
  for (int64_t s = 0; s < slots; ++s)
    kernels::quantize_row(lut + s * stride, entries, lows[static_cast<size_t>(s)], 65535.0f / range, 65535.0f,
                          out.low_byte.data() + s * kEntries, out.high_byte.data() + s * kEntries, 0.0f, nullptr,
                          nullptr);
}

void quantize(const float* lut, int64_t slots, int64_t entries, int64_t stride, ByteTables& out) {
  VQKV_CHECK(entries <= kEntries && slots <= kMaxSlots);
  out.entries = entries;
  out.bytes.assign(static_cast<size_t>(slots * kEntries), 0);
  const auto [lows, range] = lowest(lut, slots, entries, stride);
  out.bound = std::numeric_limits<float>::infinity();
  if (!(range < kWidest)) return;
  out.step = range / 255.0f;
  double base = 0, bound = 0;
  const float inverse = range > 0 ? 255.0f / range : 0.0f;
  for (int64_t s = 0; s < slots; ++s) {
    const float low = lows[static_cast<size_t>(s)];
    float under = 0, over = 0;  // extremes of the rounding error; their middle goes to the base
    kernels::quantize_row(lut + s * stride, entries, low, inverse, 255.0f, out.bytes.data() + s * kEntries, nullptr,
                          out.step, &under, &over);
    base += low + 0.5 * (static_cast<double>(under) + over);
    bound += 0.5 * (static_cast<double>(over) - under);
  }
  out.base = static_cast<float>(base);
  out.bound = static_cast<float>(bound);
}

bool fixed_pays(int64_t entries) {
  return entries <= kEntries && (cpu_features().avx512_vbmi || (cpu_features().avx2 && entries <= 64));
}

void fixed(const FixedTables& tables, const uint8_t* const* runs, int64_t count, int64_t slots, float* out) {
  if constexpr (kX86Units) {
    if (cpu_features().avx512_vbmi && tables.entries > 16)  // one 16-entry shuffle beats four permutes
      return fixed_vbmi(tables, runs, count, slots, out);
    if (cpu_features().avx2) return fixed_avx2(tables, runs, count, slots, out);
  }
  fixed_portable(tables, runs, count, slots, out);
}

void bytes(const ByteTables& tables, const uint8_t* const* runs, int64_t count, int64_t slots, float* out) {
  if constexpr (kX86Units) {
    if (cpu_features().avx512_vbmi && tables.entries > 16)  // one 16-entry shuffle beats four permutes
      return bytes_vbmi(tables, runs, count, slots, out);
    if (cpu_features().avx2) return bytes_avx2(tables, runs, count, slots, out);
  }
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

}  // namespace vqkv::scan
