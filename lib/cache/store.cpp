#include "cache/store.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

namespace vqkv {

BlockAddress HostStore::allocate(int64_t bytes) {
  void* p = memory_->allocate(static_cast<size_t>(bytes), 64);
  std::memset(p, 0, static_cast<size_t>(bytes));
  return reinterpret_cast<BlockAddress>(p);
}

void HostStore::release(BlockAddress block, int64_t bytes) {
  if (block != 0) memory_->deallocate(at(block), static_cast<size_t>(bytes), 64);
}

void HostStore::charge(int64_t bytes) {
  if (auto* counting = dynamic_cast<CountingResource*>(memory_)) counting->charge(bytes);
}

namespace {

// Element (head, channel, token) of a chunk that holds `held` tokens. Keys are channel-major, so that a tile of K^T is
// read in runs of tokens; values are token-major.
int64_t place(Role role, int64_t head, int64_t channel, int64_t token, int64_t head_dim, int64_t held) {
  return role == Role::kKey ? (head * head_dim + channel) * held + token : (head * held + token) * head_dim + channel;
}

// Refuses what leaves the type: an infinity would poison every query, and a clipped value would be another one.
template <class Place>
void narrow(const CachePolicy& policy, const float* values, int64_t n, std::byte* base, int64_t index,
            const Place& where) {
  policy.check_exact(values, n, where);
  switch (policy.exact_dtype) {
    case DType::kF16:
      to_f16(values, reinterpret_cast<f16*>(base) + index, n);
      return;
    case DType::kBF16:
      to_bf16(values, reinterpret_cast<bf16*>(base) + index, n);
      return;
    default:
      std::memcpy(reinterpret_cast<float*>(base) + index, values, static_cast<size_t>(4 * n));
      return;
  }
}

// (rows, n) from element `index` on, in_stride elements from row to row.
void widen(DType type, const std::byte* base, int64_t index, int64_t in_stride, float* out, int64_t out_stride,
           int64_t rows, int64_t n) {
  switch (type) {
    case DType::kF16:
      return to_float(reinterpret_cast<const f16*>(base) + index, in_stride, out, out_stride, rows, n);
    case DType::kBF16:
      return to_float(reinterpret_cast<const bf16*>(base) + index, in_stride, out, out_stride, rows, n);
    default:
      for (int64_t r = 0; r < rows; ++r)
        std::memcpy(out + r * out_stride, reinterpret_cast<const float*>(base) + index + r * in_stride,
                    static_cast<size_t>(4 * n));
  }
}

// Runs of tokens that lie in one block of memory: the sinks, then chunk by chunk.
template <class Body>
void for_each_run(const RoleMap& role, int64_t sinks, int64_t first, int64_t count, Body&& body) {
  for (int64_t t = first; t < first + count;) {
    if (t < sinks) {
      const int64_t n = std::min(sinks, first + count) - t;
      body(HostStore::at(role.sinks), sinks, t, t - first, n);
      t += n;
    } else {
      const int64_t chunk = (t - sinks) / kChunkTokens, within = (t - sinks) % kChunkTokens;
      const int64_t n = std::min(kChunkTokens - within, first + count - t);
      body(HostStore::at(role.chunks.at(chunk)), kChunkTokens, within, t - first, n);
      t += n;
    }
  }
}

}  // namespace

void store_exact(const SequenceMap& map, int layer, Role role, int head, ConstMatrix rows, int64_t first_token) {
  const int64_t d = map.model->shape().head_dim;
  std::vector<float> line(static_cast<size_t>(std::max(map.policy.sinks, kChunkTokens)));
  for_each_run(map.role(layer, role), map.policy.sinks, first_token, rows.rows,
               [&](std::byte* base, int64_t held, int64_t within, int64_t at, int64_t n) {
                 const auto where = [&](int64_t row, int64_t channel) {
                   return fmt::format("layer {}, {} of KV head {}, token {}, channel {}", layer,
                                      role == Role::kKey ? "key" : "value", head, first_token + row, channel);
                 };
                 if (role == Role::kKey) {
                   for (int64_t c = 0; c < d; ++c) {
                     for (int64_t i = 0; i < n; ++i) line[static_cast<size_t>(i)] = rows(at + i, head * d + c);
                     narrow(map.policy, line.data(), n, base, place(role, head, c, within, d, held),
                            [&](int64_t i) { return where(at + i, c); });
                   }
                 } else {
                   for (int64_t i = 0; i < n; ++i)
                     narrow(map.policy, rows.row(at + i) + head * d, d, base, place(role, head, 0, within + i, d, held),
                            [&](int64_t c) { return where(at + i, c); });
                 }
               });
}

void load_exact_keys(const SequenceMap& map, int layer, int head, int64_t first, int64_t count, float* out,
                     int64_t stride) {
  const int64_t d = map.model->shape().head_dim;
  for_each_run(map.role(layer, Role::kKey), map.policy.sinks, first, count,
               [&](const std::byte* base, int64_t held, int64_t within, int64_t at, int64_t n) {
                 widen(map.policy.exact_dtype, base, place(Role::kKey, head, 0, within, d, held), held, out + at,
                       stride, d, n);
               });
}

void load_exact_values(const SequenceMap& map, int layer, int head, int64_t first, int64_t count, float* out,
                       int64_t stride) {
  const int64_t d = map.model->shape().head_dim;
  for_each_run(map.role(layer, Role::kValue), map.policy.sinks, first, count,
               [&](const std::byte* base, int64_t held, int64_t within, int64_t at, int64_t n) {
                 widen(map.policy.exact_dtype, base, place(Role::kValue, head, 0, within, d, held), d,
                       out + at * stride, stride, n, d);
               });
}

}  // namespace vqkv
