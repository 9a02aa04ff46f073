// Exact rows of some sequences on a device, in pages that lie in no order; what no token fills is never written.
#pragma once
#include <functional>
#include <span>
#include <vector>

#include "attention/exact_rows.h"
#include "core/dtype.h"
#include "device/runtime.h"

namespace vqkv {

inline constexpr int kMostExact = 128;  // tokens of a sequence beside codes

struct ExactPages {
  device::Buffer<uint16_t> rows[2];
  device::Buffer<int32_t> table, lengths;
  int most_pages = 0;

  // number(role, sequence, head, token, channel): keys are role 0. No lengths: none are exact.
  ExactPages(int kv_heads, int head_dim, const std::vector<int32_t>& tokens,
             const std::function<double(int, int, int, int, int)>& number, DType dtype = DType::kF16,
             int most_tokens = kMostExact)
      : most_pages((most_tokens + kDevicePageTokens - 1) / kDevicePageTokens) {
    if (tokens.empty()) return;
    const int sequences = static_cast<int>(tokens.size()), pages = sequences * most_pages;
    const auto d = static_cast<size_t>(head_dim);
    std::vector<int32_t> order;
    for (int p = 0; p < pages; ++p) order.push_back(pages - 1 - p);
    for (int role = 0; role < 2; ++role) {
      rows[role] =
          device::Buffer<uint16_t>(static_cast<size_t>(pages * kv_heads * kDevicePageTokens) * d, "exact rows");
      for (int s = 0; s < sequences; ++s)
        for (int h = 0; h < kv_heads; ++h)
          for (int t = 0; t < tokens[static_cast<size_t>(s)]; ++t) {
            std::vector<uint16_t> bits(d);
            for (int c = 0; c < head_dim; ++c) {
              const auto v = static_cast<float>(number(role, s, h, t, c));
              bits[static_cast<size_t>(c)] = dtype == DType::kF16 ? to_f16(v).bits : to_bf16(v).bits;
            }
            const int page = order[static_cast<size_t>(s * most_pages + t / kDevicePageTokens)];
            const int at = (page * kv_heads + h) * kDevicePageTokens + t % kDevicePageTokens;
            device::copy_in(rows[role].data() + static_cast<size_t>(at) * d, bits.data(), d * sizeof(uint16_t));
          }
    }
    table = device::Buffer<int32_t>(std::span<const int32_t>(order), "exact page table");
    lengths = device::Buffer<int32_t>(std::span<const int32_t>(tokens), "exact lengths");
  }
  ExactRows view() const { return {rows[0].data(), rows[1].data(), table.data(), lengths.data(), most_pages}; }
};

}  // namespace vqkv
