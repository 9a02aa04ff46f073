#include <cstring>

#include "codec/packing.h"
#include "core/error.h"
#include "core/rng.h"
#include "support/catch.h"

using namespace vqkv;

namespace {

// Bit by bit, straight from the definition.
std::vector<uint8_t> pack_slowly(const std::vector<uint16_t>& codes, int bits) {
  std::vector<uint8_t> out((codes.size() * static_cast<size_t>(bits) + 7) / 8, 0);
  for (size_t i = 0; i < codes.size(); ++i)
    for (int b = 0; b < bits; ++b) {
      const size_t bit = i * static_cast<size_t>(bits) + static_cast<size_t>(b);
      out[bit / 8] = static_cast<uint8_t>(out[bit / 8] | (((codes[i] >> b) & 1) << (bit % 8)));
    }
  return out;
}

std::vector<uint16_t> random_codes(int64_t n, int bits, uint64_t seed) {
  Rng rng(seed);
  std::vector<uint16_t> codes(static_cast<size_t>(n));
  for (auto& c : codes) c = static_cast<uint16_t>(rng.below(uint64_t{1} << bits));
  return codes;
}

}  // namespace

TEST_CASE("KIVI's packed byte of the codes 1, 3, 0, 2", "[packing]") {
  const uint16_t codes[64] = {1, 3, 0, 2};
  uint8_t bytes[16];
  pack64(codes, 2, bytes);
  CHECK(bytes[0] == 0x8D);  // baseline-methods 2.9
}

TEST_CASE("groups of 64 are a slice of the whole string", "[packing]") {
  for (int bits = 1; bits <= 16; ++bits) {
    const auto codes = random_codes(64 * 3, bits, static_cast<uint64_t>(bits));
    const auto expected = pack_slowly(codes, bits);
    for (int g = 0; g < 3; ++g) {
      std::vector<uint8_t> packed(static_cast<size_t>(8 * bits));
      pack64(codes.data() + 64 * g, bits, packed.data());
      REQUIRE(std::memcmp(packed.data(), expected.data() + g * 8 * bits, packed.size()) == 0);
      uint16_t back[64];
      unpack64(packed.data(), bits, back);
      REQUIRE(std::memcmp(back, codes.data() + 64 * g, sizeof back) == 0);
      if (bits <= 8) {
        uint8_t narrow[64], packed8[64];
        unpack64(packed.data(), bits, narrow);
        for (int i = 0; i < 64; ++i) REQUIRE(narrow[i] == back[i]);
        pack64(narrow, bits, packed8);
        REQUIRE(std::memcmp(packed8, packed.data(), packed.size()) == 0);
      }
    }
  }
}

TEST_CASE("unpacking from any place", "[packing]") {
  for (int bits = 1; bits <= 16; ++bits) {
    const auto codes = random_codes(90, bits, static_cast<uint64_t>(77 + bits));
    const auto packed = pack_slowly(codes, bits);
    for (int64_t first = 0; first < 90; ++first)
      for (const int64_t n : {int64_t{0}, int64_t{1}, (90 - first) / 2, 90 - first}) {
        std::vector<uint16_t> back(static_cast<size_t>(n));
        unpack_bits_at(packed.data(), first, n, bits, back.data());
        REQUIRE(std::equal(back.begin(), back.end(), codes.begin() + first));
      }
  }
}

TEST_CASE("widths out of range are refused", "[packing]") {
  uint16_t codes[64] = {};
  uint8_t out[136];
  for (const int bits : {0, 17}) {
    CHECK_THROWS_AS(pack64(codes, bits, out), Error);
    CHECK_THROWS_AS(unpack64(out, bits, codes), Error);
    CHECK_THROWS_AS(unpack_bits_at(out, 0, 1, bits, codes), Error);
  }
  uint8_t narrow[64] = {};
  CHECK_THROWS_AS(pack64(narrow, 9, out), Error);
}
