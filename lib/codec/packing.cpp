#include "codec/packing.h"

#include <array>
#include <bit>
#include <cstring>
#include <utility>

#include "codec/packing_vbmi.h"
#include "core/cpu.h"
#include "core/error.h"

namespace vqkv {
namespace {

static_assert(std::endian::native == std::endian::little, "packed words are read as little-endian integers");

// A group of 64 codes of B bits is exactly B 64-bit words. With B known at compile time every word and shift is a
// constant, and whole words are loaded: assembling odd byte counts in memory stalled on store forwarding (7x slower).
template <int B, class Code, size_t... I>
inline void unpack_words(const uint64_t* word, Code* codes, std::index_sequence<I...>) {
  constexpr uint64_t mask = (uint64_t{1} << B) - 1;
  const auto get = [&](auto index) -> Code {
    constexpr int bit = static_cast<int>(decltype(index)::value) * B;
    constexpr int shift = bit % 64;
    uint64_t v = word[bit / 64] >> shift;
    if constexpr (shift + B > 64) v |= word[bit / 64 + 1] << (64 - shift);
    return static_cast<Code>(v & mask);
  };
  ((codes[I] = get(std::integral_constant<size_t, I>{})), ...);
}

template <int B, class Code, size_t... I>
inline void pack_words(const Code* codes, uint64_t* word, std::index_sequence<I...>) {
  constexpr uint64_t mask = (uint64_t{1} << B) - 1;
  const auto put = [&](auto index) {
    constexpr int bit = static_cast<int>(decltype(index)::value) * B;
    constexpr int shift = bit % 64;
    const uint64_t v = codes[decltype(index)::value] & mask;
    word[bit / 64] |= v << shift;
    if constexpr (shift + B > 64) word[bit / 64 + 1] |= v >> (64 - shift);
  };
  (put(std::integral_constant<size_t, I>{}), ...);
}

using Group = std::make_index_sequence<64>;

template <int B, class Code>
void unpack_group(const uint8_t* in, Code* codes) {
  uint64_t word[B];
  std::memcpy(word, in, sizeof word);
  unpack_words<B>(word, codes, Group{});
}
template <int B, class Code>
void pack_group(const Code* codes, uint8_t* out) {
  uint64_t word[B] = {};
  pack_words<B>(codes, word, Group{});
  std::memcpy(out, word, sizeof word);
}

template <class Code>
using Unpack = void (*)(const uint8_t*, Code*);
template <class Code>
using Pack = void (*)(const Code*, uint8_t*);

template <class Code, size_t... I>
constexpr std::array<Unpack<Code>, sizeof...(I)> unpack_table(std::index_sequence<I...>) {
  return {&unpack_group<static_cast<int>(I) + 1, Code>...};
}
template <class Code, size_t... I>
constexpr std::array<Pack<Code>, sizeof...(I)> pack_table(std::index_sequence<I...>) {
  return {&pack_group<static_cast<int>(I) + 1, Code>...};
}

constexpr auto kUnpack16 = unpack_table<uint16_t>(std::make_index_sequence<16>{});
constexpr auto kUnpack8 = unpack_table<uint8_t>(std::make_index_sequence<8>{});
constexpr auto kPack16 = pack_table<uint16_t>(std::make_index_sequence<16>{});
constexpr auto kPack8 = pack_table<uint8_t>(std::make_index_sequence<8>{});

void check_bits(int bits, int most) {
  if (bits < 1 || bits > most)
    fail_internal("packing takes 1.." + std::to_string(most) + " bits, not " + std::to_string(bits));
}

}  // namespace

void pack64(const uint16_t* codes, int bits, uint8_t* out) {
  check_bits(bits, 16);
  kPack16[static_cast<size_t>(bits - 1)](codes, out);
}
void pack64(const uint8_t* codes, int bits, uint8_t* out) {
  check_bits(bits, 8);
  kPack8[static_cast<size_t>(bits - 1)](codes, out);
}
void unpack64(const uint8_t* in, int bits, uint16_t* codes) {
  check_bits(bits, 16);
  if constexpr (kX86Units)
    if (cpu_features().avx512_vbmi) return unpack64_vbmi(in, bits, codes);
  kUnpack16[static_cast<size_t>(bits - 1)](in, codes);
}
void unpack64(const uint8_t* in, int bits, uint8_t* codes) {
  check_bits(bits, 8);
  if constexpr (kX86Units)
    if (cpu_features().avx512_vbmi) return unpack64_vbmi(in, bits, codes);
  kUnpack8[static_cast<size_t>(bits - 1)](in, codes);
}

void unpack_bits_at(const uint8_t* in, int64_t first, int64_t n, int bits, uint16_t* codes) {
  check_bits(bits, 16);
  if (n <= 0) return;
  const uint32_t mask = (uint32_t{1} << bits) - 1;
  const uint8_t* p = in + first * bits / 8;
  const int skip = static_cast<int>(first * bits % 8);
  uint64_t pending = static_cast<uint64_t>(*p++) >> skip;
  int held = 8 - skip;
  for (int64_t i = 0; i < n; ++i) {
    for (; held < bits; held += 8) pending |= static_cast<uint64_t>(*p++) << held;
    codes[i] = static_cast<uint16_t>(pending & mask);
    pending >>= bits;
    held -= bits;
  }
}

}  // namespace vqkv
