#include "core/panel_int4.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "core/dtype.h"

namespace vqkv {
namespace {

constexpr float kMiddle = 8, kEnd = 15;  // code of weight 0, largest code

f16 scale_at(const std::byte* panel, int64_t group, int64_t lane) {
  f16 scale;
  std::memcpy(&scale, panel + 2 * (group * kPanelWidth + lane), sizeof scale);
  return scale;
}

float weight_of(uint8_t codes, bool second, float scale) {
  return scale * (static_cast<float>(second ? codes >> 4 : codes & 15) - kMiddle);
}

}  // namespace

void Int4Panel::narrow(const float* weights, int64_t lane, std::byte* panel) const {
  std::byte* codes = panel + 2 * groups() * kPanelWidth;
  for (int64_t g = 0; g < groups(); ++g) {
    const int64_t first = g * group, end = std::min(depth, first + group);
    float most = 0;
    for (int64_t k = first; k < end; ++k) most = std::max(most, std::abs(weights[k]));
    const f16 stored = to_f16(std::min(2 * most / kEnd, 65504.0f));
    std::memcpy(panel + 2 * (g * kPanelWidth + lane), &stored, sizeof stored);
    const float scale = to_float(stored);
    for (int64_t k = first; k < end; ++k) {
      const float code = scale > 0 ? std::clamp(std::nearbyint(weights[k] / scale) + kMiddle, 0.0f, kEnd) : kMiddle;
      codes[k / 2 * kPanelWidth + lane] |= static_cast<std::byte>(static_cast<unsigned>(code) << (k % 2 * 4));
    }
  }
}

void Int4Panel::widen(const std::byte* panel, float* out) const {
  const auto* codes = reinterpret_cast<const uint8_t*>(panel + 2 * groups() * kPanelWidth);
  std::array<float, kPanelWidth> scale;
  for (int64_t k = 0; k < depth; ++k) {
    if (k % group == 0)
      for (int64_t lane = 0; lane < kPanelWidth; ++lane)
        scale[static_cast<size_t>(lane)] = to_float(scale_at(panel, k / group, lane));
    const uint8_t* pair = codes + k / 2 * kPanelWidth;
    for (int64_t lane = 0; lane < kPanelWidth; ++lane)
      out[k * kPanelWidth + lane] = weight_of(pair[lane], k % 2 == 1, scale[static_cast<size_t>(lane)]);
  }
}

void Int4Panel::widen_column(const std::byte* panel, int64_t lane, float* out) const {
  const auto* codes = reinterpret_cast<const uint8_t*>(panel + 2 * groups() * kPanelWidth);
  for (int64_t k = 0; k < depth; ++k)
    out[k] = weight_of(codes[k / 2 * kPanelWidth + lane], k % 2 == 1, to_float(scale_at(panel, k / group, lane)));
}

}  // namespace vqkv
