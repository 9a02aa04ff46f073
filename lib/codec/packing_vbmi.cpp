// g++ 12 takes the undefined starting value of its own intrinsics for a mistake.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include "codec/packing_vbmi.h"

#include <immintrin.h>

#include <array>

namespace vqkv {
namespace {

struct alignas(64) Bytes {
  uint8_t at[64];
  __m512i load() const { return _mm512_load_si512(at); }
};

// How codes of a width are found: byte j of lane i is byte from.at[8 i + j] of what is read, and its bits from
// right.at[8 i + j] on are byte j of the lane's codes.
struct Ways {
  Bytes from, right;
};

// Codes of `bytes` bytes each: 8 or 4 a lane.
constexpr Ways ways_of(int bits, int bytes) {
  Ways w{};
  for (int i = 0; i < 64; ++i) {
    const int lane = i / 8, byte = i % 8, first = lane * 8 / bytes * bits;  // bit that the lane's codes begin at
    w.from.at[i] = static_cast<uint8_t>((first / 8 + byte) % 64);
    w.right.at[i] = static_cast<uint8_t>((first % 8 + byte / bytes * bits + byte % bytes * 8) % 64);
  }
  return w;
}

template <int kBytes, int kWidths>
constexpr std::array<Ways, kWidths> all_ways() {
  std::array<Ways, kWidths> all{};
  for (int bits = 1; bits <= kWidths; ++bits) all[static_cast<size_t>(bits - 1)] = ways_of(bits, kBytes);
  return all;
}
constexpr std::array<Ways, 16> kWide = all_ways<2, 16>();
constexpr std::array<Ways, 8> kNarrow = all_ways<1, 8>();

inline __m512i take(const uint8_t* in, int bytes, const Ways& w) {
  const __m512i all = _mm512_maskz_loadu_epi8(~uint64_t{0} >> (64 - bytes), in);
  return _mm512_multishift_epi64_epi8(w.right.load(), _mm512_permutexvar_epi8(w.from.load(), all));
}

}  // namespace

void unpack64_vbmi(const uint8_t* in, int bits, uint16_t* codes) {
  const Ways& w = kWide[static_cast<size_t>(bits - 1)];
  const __m512i mask = _mm512_set1_epi16(static_cast<int16_t>((1 << bits) - 1));
  for (int half = 0; half < 2; ++half)
    _mm512_storeu_si512(codes + 32 * half, _mm512_and_si512(take(in + half * 4 * bits, 4 * bits, w), mask));
}

void unpack64_vbmi(const uint8_t* in, int bits, uint8_t* codes) {
  const __m512i mask = _mm512_set1_epi8(static_cast<int8_t>((1 << bits) - 1));
  _mm512_storeu_si512(codes, _mm512_and_si512(take(in, 8 * bits, kNarrow[static_cast<size_t>(bits - 1)]), mask));
}

}  // namespace vqkv
