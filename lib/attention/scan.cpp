#include "attention/scan.h"

#include <algorithm>
#include <cmath>

#include "cache/kernels.h"
#include "core/cpu.h"

namespace vqkv::scan {

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
  out.exact_enough = static_cast<float>(slots) * out.step * 0.5f <= kScanLimit;
  if (!out.exact_enough || range == 0.0f) return;
  const float inverse = 65535.0f / range;
  for (int64_t s = 0; s < slots; ++s) {
    for (int64_t e = 0; e < entries; ++e) {
      const float q = (lut[s * stride + e] - lows[static_cast<size_t>(s)]) * inverse + 0.5f;
      const int32_t code = std::min(65535, static_cast<int32_t>(q));
      out.low_byte[static_cast<size_t>(s * kEntries + e)] = static_cast<uint8_t>(code & 0xff);
      out.high_byte[static_cast<size_t>(s * kEntries + e)] = static_cast<uint8_t>(code >> 8);
    }
  }
}

bool fixed_available() { return cpu_features().avx512_vbmi; }

void fixed(const FixedTables& tables, const uint8_t* const* runs, int64_t count, int64_t slots, float* out) {
  if (fixed_available()) fixed_vbmi(tables, runs, count, slots, out);
  else fixed_portable(tables, runs, count, slots, out);
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
