// What codecs of the project write, attended on a device: beside attention over the rows that they decode to.
#include <algorithm>
#include <cmath>
#include <span>

#include "attention/device_tiles.h"
#include "attention/level_decode.h"
#include "core/dtype.h"
#include "core/rng.h"
#include "kernels/reference_attention.h"
#include "support/catch.h"
#include "support/device.h"
#include "support/error_of.h"

using namespace vqkv;
using device::Buffer;

namespace {

std::unique_ptr<Codec> codec_of(const std::string& method, const Json& knobs, Role role, int heads, int head_dim) {
  UnitShape unit;
  unit.role = role;
  unit.heads = heads;
  unit.head_dim = head_dim;
  const Method& m = find_method(method);
  return m.make(m.canonical(knobs, ""), unit);
}

}  // namespace

TEST_CASE("what kivi wrote is attended on a device as it decodes", "[kernel][levels]") {
  const int bits = GENERATE(2, 4), head_dim = GENERATE(64, 128), heads = 2, group = 3, tokens = 96;
  CAPTURE(bits, head_dim);
  const auto d = static_cast<size_t>(head_dim);
  Rng rng(3);
  const int tiles = tokens / kLevelTile;
  Matrix<float> decoded[2];
  std::vector<uint32_t> words[2];
  std::vector<uint16_t> sides[2];
  for (const Role role : {Role::kKey, Role::kValue}) {
    const auto r = static_cast<size_t>(role == Role::kValue);
    const auto codec = codec_of("kivi", {{"bits", bits}}, role, heads, head_dim);
    Matrix<float> x(tokens, heads * head_dim);
    for (float& v : x.storage) v = static_cast<float>(rng.normal());
    CodeBlock codes;
    codec->encode(x, codes);
    const DecodePlan plan = codec->plan();
    REQUIRE(level_tiles_reason(plan, role, head_dim).empty());
    decoded[r] = Matrix<float>(tokens, heads * head_dim);
    decode_plan(plan, codes, decoded[r]);
    const size_t of_words = d * static_cast<size_t>(bits), of_sides = 2 * d;
    words[r].resize(static_cast<size_t>(tiles * heads) * of_words);
    sides[r].resize(static_cast<size_t>(tiles * heads) * of_sides);
    for (int t = 0; t < tiles; ++t)
      for (int h = 0; h < heads; ++h) {
        const auto at = static_cast<size_t>(t * heads + h);
        pack_level_tile(plan, codes, role, t * kLevelTile, h, head_dim,
                        std::span(words[r]).subspan(at * of_words, of_words),
                        std::span(sides[r]).subspan(at * of_sides, of_sides));
      }
  }
  std::vector<float> queries(static_cast<size_t>(heads * group) * d);
  for (float& q : queries) q = static_cast<float>(rng.normal() * 1.4427 / std::sqrt(head_dim));

  const std::vector<int32_t> table{0, 1, 2}, length{tokens};
  const Buffer<float> query(std::span<const float>(queries), "queries");
  const Buffer<uint32_t> k(std::span<const uint32_t>(words[0]), "key codes"),
      v(std::span<const uint32_t>(words[1]), "value codes");
  const Buffer<uint16_t> k_sides(std::span<const uint16_t>(sides[0]), "key sides"),
      v_sides(std::span<const uint16_t>(sides[1]), "value sides");
  const Buffer<int32_t> tile_table(std::span<const int32_t>(table), "tile table"),
      lengths(std::span<const int32_t>(length), "lengths");
  Buffer<float> out(queries.size(), "out");
  LevelDecoder decode(1, heads, group, head_dim, bits, 2);
  LevelDecode call{query.data(),   k.data(),          v.data(),       k_sides.data(),
                   v_sides.data(), tile_table.data(), lengths.data(), out.data()};
  call.sequences = 1, call.kv_heads = heads, call.group = group, call.most_tiles = tiles;
  decode(call);
  const std::vector<float> found = out.values();
  double error = 0, size = 0;
  for (int h = 0; h < heads; ++h)
    for (int g = 0; g < group; ++g) {
      const size_t q = static_cast<size_t>(h * group + g) * d;
      std::vector<float> expected(d);
      reference_attention(
          queries.data() + q, tokens, head_dim, [&](int t, int c) { return decoded[0](t, h * head_dim + c); },
          [&](int t, int c) { return decoded[1](t, h * head_dim + c); }, expected.data());
      for (size_t c = 0; c < d; ++c) {
        error += std::pow(double{found[q + c]} - double{expected[c]}, 2);
        size += std::pow(double{expected[c]}, 2);
      }
    }
  CHECK(std::sqrt(error / size) < 1e-3);  // half's rounding of queries, weights and their scales
}

TEST_CASE("what kernels of levels can't take is said", "[kernel][levels]") {
  const auto reason = [](const std::string& method, const Json& knobs, Role role, int head_dim) {
    return level_tiles_reason(codec_of(method, knobs, role, 1, head_dim)->plan(), role, head_dim);
  };
  CHECK(reason("kivi", {{"bits", 2}}, Role::kValue, 128).empty());
  check_says(reason("kivi", {{"bits", 3}}, Role::kKey, 128), "levels of 3 bits");
  check_says(reason("kivi", {{"group", 64}}, Role::kKey, 128), "each channel of 32 tokens");
  check_says(reason("kivi", {{"group", 16}}, Role::kValue, 128), "each token and 32 channels");
  check_says(reason("kivi", {{"bits", 2}}, Role::kKey, 96), "head_dim 96");
  check_says(reason("fp8", Json::object(), Role::kKey, 64), "levels of 8 bits");
  check_says(reason("ggml", {{"type", "iq4_nl"}}, Role::kKey, 64), "no code times a scale and a zero");
  check_says(reason("exact", Json::object(), Role::kValue, 64), "no levels alone");
}
