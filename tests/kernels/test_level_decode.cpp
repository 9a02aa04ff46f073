// Decode attention on levels on a device, KIVI's groups of 32. Lattice data make every intermediate exact.
#include <algorithm>
#include <cmath>
#include <span>

#include "attention/level_decode.h"
#include "core/dtype.h"
#include "core/rng.h"
#include "kernels/exact_pages.h"
#include "kernels/reference_attention.h"
#include "support/catch.h"
#include "support/device.h"
#include "support/error_of.h"

using namespace vqkv;
using device::Buffer;

namespace {

struct LevelCase {
  int head_dim, bits, sequences, kv_heads, group;
  std::vector<int32_t> lengths;
  int most_tiles;
  std::vector<float> queries;
  // (tiles, kv_heads, tokens, channels); sides (scale, zero): keys by channel, values by token and group.
  std::vector<uint8_t> codes[2];
  std::vector<float> key_sides, value_sides;
  std::vector<int32_t> exact;        // tokens that are exact beside the coded ones; empty: none
  std::vector<float> exact_rows[2];  // (sequences, kv_heads, kMostExact, head_dim)

  LevelCase(int head_dim_, int bits_, int kv_heads_, int group_, std::vector<int32_t> lengths_, bool lattice,
            uint64_t seed)
      : head_dim(head_dim_),
        bits(bits_),
        sequences(static_cast<int>(lengths_.size())),
        kv_heads(kv_heads_),
        group(group_),
        lengths(std::move(lengths_)),
        most_tiles((*std::max_element(lengths.begin(), lengths.end()) + kLevelTile - 1) / kLevelTile) {
    Rng rng(seed);
    const auto half = [](double v) { return to_float(to_f16(static_cast<float>(v))); };
    const size_t tiles = static_cast<size_t>(sequences * most_tiles * kv_heads);
    queries.assign(static_cast<size_t>(sequences * kv_heads * group * head_dim), 0.0f);
    const double scale = 1.4427 / std::sqrt(head_dim);
    if (lattice)
      for (size_t q = 0; q < queries.size(); q += static_cast<size_t>(head_dim))
        for (int i = 0; i < 3; ++i)
          queries[q + rng.below(static_cast<uint64_t>(head_dim))] = static_cast<float>(rng.below(2)) * 2 - 1;
    else
      for (float& x : queries) x = half(rng.normal() * scale);
    for (int role = 0; role < 2; ++role) {
      codes[role].resize(tiles * kLevelTile * static_cast<size_t>(head_dim));
      const uint64_t levels = lattice && role == 0 ? 3 : uint64_t{1} << bits;
      for (uint8_t& c : codes[role]) c = static_cast<uint8_t>(rng.below(levels));
    }
    key_sides.resize(tiles * static_cast<size_t>(head_dim) * 2);
    value_sides.resize(tiles * kLevelTile * static_cast<size_t>(head_dim / 32) * 2);
    for (size_t i = 0; i < key_sides.size(); i += 2) {
      key_sides[i] = lattice ? 1.0f : half(0.1 + 0.4 * rng.uniform());
      key_sides[i + 1] = lattice ? static_cast<float>(rng.below(2)) : half(rng.normal());
    }
    for (size_t i = 0; i < value_sides.size(); i += 2) {
      value_sides[i] = lattice ? 0.5f * static_cast<float>(1 << rng.below(3)) : half(0.1 + 0.4 * rng.uniform());
      value_sides[i + 1] = lattice ? static_cast<float>(rng.below(5)) - 2 : half(rng.normal());
    }
  }

  // Tiles of a sequence lie behind those of the next ones.
  int tile_of(int s, int t) const { return (sequences - 1 - s) * most_tiles + t / kLevelTile; }
  size_t unit(int s, int h, int t) const { return static_cast<size_t>(tile_of(s, t) * kv_heads + h); }
  double value(int role, int s, int h, int t, int c) const {
    const size_t at = unit(s, h, t);
    const auto in = static_cast<size_t>(t % kLevelTile);
    const auto d = static_cast<size_t>(head_dim), channel = static_cast<size_t>(c), groups = d / 32;
    const float* side = role == 0 ? key_sides.data() + (at * d + channel) * 2
                                  : value_sides.data() + ((at * kLevelTile + in) * groups + channel / 32) * 2;
    return double{side[0]} * codes[role][(at * kLevelTile + in) * d + channel] + double{side[1]};
  }

  // The same queries over exact tokens, too.
  LevelCase with_exact(std::vector<int32_t> tokens, bool lattice) const {
    LevelCase out = *this;
    out.exact = std::move(tokens);
    Rng rng(12);
    for (int role = 0; role < 2; ++role) {
      out.exact_rows[role].resize(static_cast<size_t>(sequences * kv_heads * kMostExact * head_dim));
      for (float& x : out.exact_rows[role])
        x = lattice ? static_cast<float>(rng.below(role ? 9 : 3)) - (role ? 4.0f : 0.0f)
                    : to_float(to_f16(static_cast<float>(rng.normal())));
    }
    return out;
  }
  int tokens_of(int s) const {
    return lengths[static_cast<size_t>(s)] + (exact.empty() ? 0 : exact[static_cast<size_t>(s)]);
  }
  double number(int role, int s, int h, int t, int c) const {
    const int n = lengths[static_cast<size_t>(s)];
    return t < n ? value(role, s, h, t, c)
                 : exact_rows[role][static_cast<size_t>(((s * kv_heads + h) * kMostExact + t - n) * head_dim + c)];
  }

  std::vector<float> expected(double* spread) const {
    std::vector<float> out(queries.size());
    *spread = 0;
    for (int s = 0; s < sequences; ++s)
      for (int h = 0; h < kv_heads; ++h)
        for (int g = 0; g < group; ++g) {
          const auto q = static_cast<size_t>(((s * kv_heads + h) * group + g) * head_dim);
          *spread = std::max(*spread, reference_attention(
                                          queries.data() + q, tokens_of(s), head_dim,
                                          [&](int t, int c) { return number(0, s, h, t, c); },
                                          [&](int t, int c) { return number(1, s, h, t, c); }, out.data() + q));
        }
    return out;
  }

  std::vector<float> run(int splits) const {
    const auto d = static_cast<size_t>(head_dim);
    const size_t units = codes[0].size() / (kLevelTile * d), words = d * static_cast<size_t>(bits);
    std::vector<uint32_t> packed[2];
    std::vector<uint16_t> sides[2];
    for (int role = 0; role < 2; ++role) {
      packed[role].assign(units * words, 0);
      sides[role].assign(units * 2 * d, 0);
      for (size_t u = 0; u < units; ++u)
        for (int t = 0; t < kLevelTile; ++t)
          for (int c = 0; c < head_dim; ++c) {
            const LevelPlace at =
                role == 0 ? level_key_place(bits, head_dim, t, c) : level_value_place(bits, head_dim, t, c);
            packed[role][u * words + static_cast<size_t>(at.word)] |=
                uint32_t{codes[role][(u * kLevelTile + static_cast<size_t>(t)) * d + static_cast<size_t>(c)]}
                << at.shift;
            for (const bool zero : {false, true}) {
              const float side = role == 0 ? key_sides[(u * d + static_cast<size_t>(c)) * 2 + zero]
                                           : value_sides[((u * kLevelTile + static_cast<size_t>(t)) * (d / 32) +
                                                          static_cast<size_t>(c / 32)) *
                                                             2 +
                                                         zero];
              const int place =
                  role == 0 ? level_key_side(head_dim, c, zero) : level_value_side(head_dim, t, c / 32, zero);
              sides[role][u * 2 * d + static_cast<size_t>(place)] = to_f16(side).bits;
            }
          }
    }
    std::vector<int32_t> table;
    for (int s = 0; s < sequences; ++s)
      for (int t = 0; t < most_tiles; ++t) table.push_back(tile_of(s, t * kLevelTile));
    const Buffer<float> query(std::span<const float>(queries), "queries");
    const Buffer<uint32_t> k(std::span<const uint32_t>(packed[0]), "key codes");
    const Buffer<uint32_t> v(std::span<const uint32_t>(packed[1]), "value codes");
    const Buffer<uint16_t> k_sides(std::span<const uint16_t>(sides[0]), "key sides");
    const Buffer<uint16_t> v_sides(std::span<const uint16_t>(sides[1]), "value sides");
    const Buffer<int32_t> tile_table(std::span<const int32_t>(table), "tile table");
    const Buffer<int32_t> tokens(std::span<const int32_t>(lengths), "lengths");
    Buffer<float> out(queries.size(), "out");
    LevelDecoder decode(sequences, kv_heads, group, head_dim, bits, splits);
    LevelDecode call{query.data(),  k.data(),   v.data(),  k_sides.data(), v_sides.data(), tile_table.data(),
                     tokens.data(), out.data(), sequences, kv_heads,       group,          most_tiles};
    const ExactPages pages(kv_heads, head_dim, exact, [&](int role, int s, int h, int t, int c) {
      return number(role, s, h, lengths[static_cast<size_t>(s)] + t, c);
    });
    call.exact = pages.view();
    decode(call);
    decode(call);  // arrivals are as they were
    return out.values();
  }
};

}  // namespace

TEST_CASE("decode on levels is exact on lattice data, in every order and split", "[kernel][levels]") {
  for (const auto& [data, splits] :
       {std::pair{LevelCase(128, 4, 1, 4, {100, 0}, true, 7).with_exact({70, 5}, true), 3},
        std::pair{LevelCase(64, 2, 2, 8, {33}, true, 8).with_exact({65}, true), 1},
        std::pair{LevelCase(128, 4, 1, 4, {270, 33}, true, 1), 3}, std::pair{LevelCase(128, 2, 2, 8, {31}, true, 2), 1},
        std::pair{LevelCase(64, 4, 1, 3, {1, 32, 65}, true, 3), 2},
        std::pair{LevelCase(64, 2, 1, 7, {200}, true, 4), 5}, std::pair{LevelCase(128, 4, 1, 1, {64}, true, 5), 1}}) {
    CAPTURE(data.head_dim, data.bits, data.group, data.lengths, splits);
    double spread = 0;
    const std::vector<float> expected = data.expected(&spread);
    REQUIRE(spread > 0);
    REQUIRE(spread <= 10);  // weights times scales are halves, sums keep within 24 bits
    in_every_order([&, &d = data, n = splits] { CHECK(d.run(n) == expected); });
  }
}

TEST_CASE("decode on levels is within half's rounding on random data", "[kernel][levels]") {
  const auto [head_dim, bits] = GENERATE(std::pair{128, 4}, std::pair{128, 2}, std::pair{64, 4}, std::pair{64, 2});
  CAPTURE(head_dim, bits);
  const LevelCase data = LevelCase(head_dim, bits, 1, 4, {250, 100}, false, 6).with_exact({40, 0}, false);
  double spread = 0, error = 0, size = 0;
  const std::vector<float> expected = data.expected(&spread), found = data.run(2);
  for (size_t i = 0; i < expected.size(); ++i) {
    error += std::pow(double{found[i]} - double{expected[i]}, 2);
    size += double{expected[i]} * double{expected[i]};
  }
  CHECK(std::sqrt(error / size) < 1e-3);
}

TEST_CASE("every code and side of a tile has a place of its own", "[kernel][levels]") {
  for (const int head_dim : {64, 128})
    for (const int bits : {2, 4}) {
      CAPTURE(head_dim, bits);
      for (const auto place : {level_key_place, level_value_place}) {
        std::vector<uint32_t> words(static_cast<size_t>(head_dim * bits));
        for (int t = 0; t < kLevelTile; ++t)
          for (int c = 0; c < head_dim; ++c) {
            const LevelPlace at = place(bits, head_dim, t, c);
            const uint32_t mask = ((1u << bits) - 1) << at.shift;
            REQUIRE((words.at(static_cast<size_t>(at.word)) & mask) == 0);
            words[static_cast<size_t>(at.word)] |= mask;
          }
        CHECK(std::all_of(words.begin(), words.end(), [](uint32_t w) { return w == ~0u; }));
      }
      std::vector<int> keys(static_cast<size_t>(2 * head_dim)), values(keys);
      for (const bool zero : {false, true}) {
        for (int c = 0; c < head_dim; ++c) ++keys.at(static_cast<size_t>(level_key_side(head_dim, c, zero)));
        for (int t = 0; t < kLevelTile; ++t)
          for (int g = 0; g < head_dim / 32; ++g)
            ++values.at(static_cast<size_t>(level_value_side(head_dim, t, g, zero)));
      }
      CHECK(std::all_of(keys.begin(), keys.end(), [](int n) { return n == 1; }));
      CHECK(std::all_of(values.begin(), values.end(), [](int n) { return n == 1; }));
    }
}

TEST_CASE("levels without a kernel are refused with those that have one", "[kernel][levels]") {
  check_says(error_of([] { LevelDecoder(1, 1, 4, 80, 4, 1); }), {"head_dim 80 at 4 bits", "64 and 128 at 2 and 4"});
  check_says(error_of([] { LevelDecoder(1, 1, 9, 64, 4, 1); }), {"9 query heads", "up to 8"});
}

TEST_CASE("decode on levels reads shared memory in the fewest passes", "[kernel][traffic]") {
  const auto [head_dim, bits] = GENERATE(std::pair{128, 4}, std::pair{128, 2}, std::pair{64, 4}, std::pair{64, 2});
  CAPTURE(head_dim, bits);
  const LevelCase data(head_dim, bits, 1, 4, {200}, false, 6);
  const auto t = shared_traffic_of([&] { data.run(2); });
  if (!t) return;
  CHECK(t->fewest_read > 0);
  CHECK(t->read == t->fewest_read);
}
