#include <algorithm>
#include <set>
#include <vector>

#include "codec/methods/table_codec.h"
#include "codec/vq_support.h"
#include "core/thread_pool.h"
#include "support/catch.h"

using namespace vqkv;
using namespace vqkv::test;

TEST_CASE("strided groups: channel c is place c div s of group c mod s", "[vq]") {
  const auto unit = unit_of(128);
  const auto order = group_channels("strided", unit, 4);  // 32-channel groups of a head of 128: stride 4
  for (int c = 0; c < 128; ++c) CHECK(order[static_cast<size_t>(c % 4 * 32 + c / 4)] == c);
}

TEST_CASE("every grouping is a permutation, and rope pairs stay together in both heads", "[vq]") {
  const auto unit = unit_of(64, 2);
  for (const std::string grouping : {"contiguous", "strided", "rope_pair"}) {
    auto order = group_channels(grouping, unit, 16);
    if (grouping == "rope_pair")
      for (size_t g = 0; g < 16; ++g)
        for (size_t i = 0; i < 4; ++i) {
          const int32_t x = order[g * 8 + i], y = order[g * 8 + 4 + i];
          CHECK(y == x + 32);
          CHECK(x % 64 < 32);
        }
    std::sort(order.begin(), order.end());
    for (int c = 0; c < 128; ++c) CHECK(order[static_cast<size_t>(c)] == c);
  }
  CHECK(check_groups("rope_pair", unit, 128) != "");
  CHECK(check_groups("rope_pair", unit_of(3, 2), 1) == "rope_pair: the 3 channels of a head make no pairs");
  CHECK(check_groups("contiguous", unit, 3) == "3 sub-vectors don't divide 128 channels");
}

TEST_CASE("rope pairs of a partial RoPE are those that rotate, then neighbours", "[vq]") {
  auto unit = unit_of(16, 2);
  unit.rope_facts = RopeFacts::plain(16, 8, 10000);
  CHECK(unit.pair(0) == std::pair{0, 4});
  CHECK(unit.pair(3) == std::pair{3, 7});
  CHECK(unit.pair(4) == std::pair{8, 9});
  CHECK(unit.pair(7) == std::pair{14, 15});
  CHECK(unit.pair(8) == std::pair{16, 20});
  CHECK(unit.pair(12) == std::pair{24, 25});
  CHECK(group_channels("rope_pair", unit, 8) == std::vector<int32_t>{0,  1,  4,  5,  2,  3,  6,  7,  8,  10, 9,
                                                                     11, 12, 14, 13, 15, 16, 17, 20, 21, 18, 19,
                                                                     22, 23, 24, 26, 25, 27, 28, 30, 29, 31});
}

TEST_CASE("variance ranks are dealt out", "[vq]") {
  auto x = gaussian(4000, 8, 1);
  const float scale[8] = {1, 8, 3, 2, 7, 5, 4, 6};
  for (int64_t r = 0; r < x.rows; ++r)
    for (int64_t c = 0; c < 8; ++c) x(r, c) *= scale[c];
  // ranks: 1 4 7 5 6 2 3 0; group 0 gets ranks 0 2 4 6, group 1 ranks 1 3 5 7
  CHECK(variance_channels(x, 2) == std::vector<int32_t>{1, 7, 6, 3, 4, 5, 2, 0});
}

TEST_CASE("pq codes at its stated rate, decodes what it encoded, and every grouping works", "[vq]") {
  const auto unit = unit_of(32);
  const auto train = gaussian(6000, 32, 2), test = gaussian(500, 32, 3);
  for (const std::string grouping : {"contiguous", "strided", "rope_pair", "variance"}) {
    const auto codec =
        trained("pq", {{"codebooks", 8}, {"bits", 6}, {"grouping", grouping}, {"iterations", 10}}, unit, train);
    CHECK(codec->layout().code_bits_per_block() == 48);
    CHECK(codec->layout().side_bits_per_block() == 0);
    const double mse = round_trip_mse(*codec, test);
    INFO(grouping << " " << mse);
    CHECK(mse < 0.20);  // 1.5 bits a value: D(R) of the Gaussian is 0.125
    CHECK(mse > 0.125);
  }
}

TEST_CASE("pq with as many codewords as distinct vectors is lossless but for the rounding of storage", "[vq]") {
  auto x = gaussian(60, 16, 4);
  for (auto& v : x.storage) v = round_to_f16(v);
  const auto codec = trained("pq", {{"codebooks", 2}, {"bits", 6}}, unit_of(16), x);
  CHECK(round_trip_mse(*codec, x) == 0.0);
}

TEST_CASE("pq trains on attention mass when asked, and says so when there is none", "[vq]") {
  const auto unit = unit_of(8);
  const auto x = gaussian(3000, 8, 5);
  std::vector<float> mass(3000, 0.001f);
  for (size_t r = 0; r < 100; ++r) mass[r] = 1.0f;
  TrainSet set = train_set(x, unit);
  auto plain = find_method("pq").make({{"codebooks", 2}, {"bits", 4}}, unit);
  auto weighted = find_method("pq").make({{"codebooks", 2}, {"bits", 4}, {"weight", "mass"}}, unit);
  CHECK_THROWS_AS(weighted->train(set, Rng(1)), Error);
  set.received_mass = mass;
  plain->train(set, Rng(1));
  weighted->train(set, Rng(1));
  const auto heavy = x.view().slice_rows(0, 100);
  CHECK(round_trip_mse(*weighted, heavy) < 0.85 * round_trip_mse(*plain, heavy));
}

TEST_CASE("a stored pq loads to the same codes, a damaged one is refused", "[vq]") {
  const auto unit = unit_of(16);
  const Json knobs = {{"codebooks", 4}, {"bits", 5}, {"grouping", "variance"}};
  const auto x = gaussian(2000, 16, 6);
  const auto codec = trained("pq", knobs, unit, x);
  Archive archive;
  codec->save(archive);
  const auto other = find_method("pq").make(knobs, unit);
  other->load(archive);
  CodeBlock a, b;
  codec->encode(x, a);
  other->encode(x, b);
  CHECK(a.fields == b.fields);
  CHECK(codec->constant_bytes() == 4 * 32 * 4 * 2);

  auto broken = archive;
  broken.tensors["codewords"].second[3] = std::numeric_limits<float>::quiet_NaN();
  CHECK_THROWS_AS(other->load(broken), Error);
  broken = archive;
  broken.tensors["codewords"].second[3] = 0.1f;  // not a half
  CHECK_THROWS_AS(other->load(broken), Error);
  broken = archive;
  broken.json["channels"][0] = broken.json["channels"][1];
  CHECK_THROWS_AS(other->load(broken), Error);
  broken = archive;
  broken.json["channels"] = "none";
  CHECK_THROWS_AS(other->load(broken), Error);
}

TEST_CASE("a pq codec refuses values that are not finite", "[vq]") {
  const auto unit = unit_of(8);
  auto x = gaussian(500, 8, 7);
  const auto codec = trained("pq", {{"codebooks", 2}, {"bits", 4}}, unit, x);
  x(3, 2) = std::numeric_limits<float>::infinity();
  CodeBlock block;
  CHECK_THROWS_AS(codec->encode(x, block), Error);
  CHECK_THROWS_AS(find_method("pq").make({{"codebooks", 2}, {"bits", 4}}, unit)->train(train_set(x, unit), Rng(1)),
                  Error);
}
