#include "core/rng.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "core/error.h"
#include "core/hash.h"

namespace vqkv {
namespace {

void philox_round(std::array<uint32_t, 4>& c, uint32_t k0, uint32_t k1) {
  const uint64_t p0 = uint64_t{0xD2511F53u} * c[0];
  const uint64_t p1 = uint64_t{0xCD9E8D57u} * c[2];
  c = {static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(p1),
       static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(p0)};
}

std::array<uint32_t, 4> philox(uint64_t key, uint64_t counter, uint64_t high) {
  std::array<uint32_t, 4> c{static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32),
                            static_cast<uint32_t>(high), static_cast<uint32_t>(high >> 32)};
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int r = 0; r < 10; ++r, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) philox_round(c, k0, k1);
  return c;
}

}  // namespace

Rng Rng::from_text(std::string_view text) {
  const Sha256Digest d = sha256(text.data(), text.size());
  uint64_t key = 0;
  for (int i = 0; i < 8; ++i) key = (key << 8) | d[static_cast<size_t>(i)];
  return Rng(key);
}

Rng Rng::split(uint64_t index) const {
  const auto c = philox(key_, index, 1);  // high word 1: never a block of this stream itself
  return Rng((uint64_t{c[1]} << 32) | c[0]);
}

void Rng::refill() {
  block_ = philox(key_, counter_++, 0);
  left_ = 4;
}

uint32_t Rng::next_u32() {
  if (left_ == 0) refill();
  return block_[static_cast<size_t>(4 - left_--)];
}
uint64_t Rng::next_u64() {
  const uint64_t low = next_u32();
  return (uint64_t{next_u32()} << 32) | low;
}
double Rng::uniform() { return static_cast<double>(next_u64() >> 11) * 0x1p-53; }

double Rng::normal() {
  if (has_spare_) {
    has_spare_ = false;
    return spare_;
  }
  const double radius = std::sqrt(-2.0 * std::log(1.0 - uniform()));
  const double angle = 2.0 * std::numbers::pi * uniform();
  spare_ = radius * std::sin(angle);
  has_spare_ = true;
  return radius * std::cos(angle);
}

uint64_t Rng::below(uint64_t n) {
  VQKV_CHECK(n > 0);
  const uint64_t limit = UINT64_MAX - UINT64_MAX % n;
  uint64_t v = next_u64();
  while (v >= limit) v = next_u64();
  return v % n;
}

std::vector<int64_t> Rng::sample(int64_t n, int64_t k) {
  std::vector<int64_t> all(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) all[static_cast<size_t>(i)] = i;
  if (k >= n) return all;
  for (int64_t i = 0; i < k; ++i)
    std::swap(all[static_cast<size_t>(i)], all[static_cast<size_t>(i) + below(static_cast<uint64_t>(n - i))]);
  // In order by marks: sorting took longer than drawing.
  std::vector<char> drawn(static_cast<size_t>(n), 0);
  for (int64_t i = 0; i < k; ++i) drawn[static_cast<size_t>(all[static_cast<size_t>(i)])] = 1;
  all.clear();
  for (int64_t i = 0; i < n; ++i)
    if (drawn[static_cast<size_t>(i)]) all.push_back(i);
  return all;
}

}  // namespace vqkv
