#include "codec/linear_map.h"

#include "codec/codec_set.h"
#include "codec/transform/transform.h"
#include "core/error.h"
#include "support/catch.h"
#include "support/linear_maps.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

std::vector<double> product(const std::vector<double>& a, const std::vector<double>& b, int rows, int middle,
                            int cols) {
  std::vector<double> c(static_cast<size_t>(rows * cols), 0.0);
  for (int i = 0; i < rows; ++i)
    for (int m = 0; m < middle; ++m)
      for (int j = 0; j < cols; ++j)
        c[static_cast<size_t>(i * cols + j)] +=
            a[static_cast<size_t>(i * middle + m)] * b[static_cast<size_t>(m * cols + j)];
  return c;
}

void check_same(const std::vector<double>& a, const std::vector<double>& b) {
  REQUIRE(a.size() == b.size());
  for (size_t i = 0; i < a.size(); ++i) REQUIRE(a[i] == Approx(b[i]).margin(1e-5).epsilon(1e-5));
}

}  // namespace

TEST_CASE("every kind of map is the matrix that it stands for", "[map]") {
  for (const Named& n : all_kinds()) {
    CAPTURE(n.name);
    check_map(n.map, n.rows, kChannels);
    CHECK_THROWS_AS(check_map(n.map, n.rows + 1, kChannels), Error);
    const std::vector<double> dense = dense_of(n.map, n.rows, kChannels);
    const std::vector<float> v = numbers(static_cast<size_t>(n.rows), 20), got = apply(n.map, v, kChannels);
    for (int j = 0; j < kChannels; ++j) {
      double sum = 0;
      for (int i = 0; i < n.rows; ++i) sum += v[static_cast<size_t>(i)] * dense[static_cast<size_t>(i * kChannels + j)];
      CHECK(got[static_cast<size_t>(j)] == Approx(sum).margin(1e-5));
    }
  }
  // H_2 / sqrt 2, by hand
  check_same(dense_of(HadamardMap{2, 2, {1, -1}, {1, 3}}, 2, 2),
             {std::sqrt(.5), 3 * std::sqrt(.5), -std::sqrt(.5), 3 * std::sqrt(.5)});
}

TEST_CASE("maps compose exactly, and keep the narrowest kind", "[map]") {
  for (const Named& a : all_kinds())
    for (const Named& b : all_kinds()) {
      if (b.rows != kChannels) continue;
      CAPTURE(a.name, b.name);
      const LinearMap both = compose(a.map, b.map, a.rows, kChannels, kChannels);
      check_map(both, a.rows, kChannels);
      check_same(dense_of(both, a.rows, kChannels),
                 product(dense_of(a.map, a.rows, kChannels), dense_of(b.map, kChannels, kChannels), a.rows, kChannels,
                         kChannels));
    }
  const DiagonalMap diagonal{numbers(16, 30)};
  const BlockMap heads = blocks({{8, 8}, {8, 8}}, 31), wide = blocks({{3, 8}, {5, 8}}, 33);
  const HadamardMap hadamard{16, 8, {}, std::vector<float>(16, -1.0f)};
  const GatherMap gather{2, {0, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 1, -1, -1, -1}, {}};
  const auto composed = [](const LinearMap& a, const LinearMap& b, int rows = 16) {
    return compose(a, b, rows, 16, 16);
  };
  CHECK(std::holds_alternative<DiagonalMap>(composed(diagonal, diagonal)));
  for (const LinearMap& m : {composed(diagonal, heads), composed(heads, diagonal), composed(heads, heads),
                             composed(hadamard, heads), composed(wide, heads, 8), composed(gather, heads, 2)}) {
    REQUIRE(std::holds_alternative<BlockMap>(m));
    CHECK(std::get<BlockMap>(m).blocks.size() == 2);
  }
  // Heads whose first and last channels are dropped are still cut between heads.
  const GatherMap inner{4, {-1, 0, -1, 1, -1, -1, -1, -1, -1, -1, 2, -1, -1, 3, -1, -1}, {}};
  const LinearMap cut = composed(inner, heads, 4);
  CHECK(columns_of(cut, 4, 8, 8).row == 2);
  CHECK(columns_of(cut, 4, 8, 8).rows == 2);
  const LinearMap empty =
      composed(GatherMap{1, {0, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1}, {}}, heads, 1);
  check_map(columns_of(empty, 1, 8, 8).map, 1, 8);
  for (const double v : dense_of(columns_of(empty, 1, 8, 8).map, 1, 8)) CHECK(v == 0);
  for (const LinearMap& m : {composed(gather, diagonal, 2), composed(gather, gather, 2)})
    CHECK(std::holds_alternative<GatherMap>(m));
  for (const LinearMap& m : {composed(hadamard, diagonal), composed(diagonal, hadamard)}) {
    REQUIRE(std::holds_alternative<HadamardMap>(m));
    CHECK(std::get<HadamardMap>(m).block == 8);
  }
  CHECK(std::holds_alternative<DenseMap>(composed(HadamardMap{16, 16, {}, {}}, heads)));
}

TEST_CASE("what a map keeps follows from its kind", "[map]") {
  CHECK(stored_bytes(IdentityMap{}) == 0);
  CHECK(stored_bytes(DiagonalMap{numbers(16, 1)}) == 64);
  CHECK(stored_bytes(GatherMap{6, std::vector<int32_t>(16, 0), {}}) == 12);
  CHECK(stored_bytes(GatherMap{6, std::vector<int32_t>(16, 0), numbers(16, 1)}) == 76);
  CHECK(stored_bytes(blocks({{8, 8}, {8, 8}}, 3)) == 2 * 64 * 4);
  CHECK(stored_bytes(blocks({{3, 8}, {5, 8}}, 3)) == 64 * 4);
  CHECK(stored_bytes(HadamardMap{16, 8, {}, {}}) == 0);
  CHECK(stored_bytes(HadamardMap{16, 8, {}, std::vector<float>(16, -1.0f)}) == 2);
  CHECK(stored_bytes(HadamardMap{16, 8, numbers(16, 1), std::vector<float>(16, -1.0f)}) == 66);
  CHECK(stored_bytes(DenseMap{5, 16, numbers(80, 1)}) == 320);
}

TEST_CASE("a head reads its own rows of a map, and no more", "[map]") {
  for (const Named& n : all_kinds())
    for (const auto& [first, count] : {std::pair{0, 16}, {0, 8}, {8, 8}, {4, 4}, {5, 9}}) {
      CAPTURE(n.name, first, count);
      const MapSlice part = columns_of(n.map, n.rows, first, count);
      check_map(part.map, part.rows, count);
      const std::vector<double> whole = dense_of(n.map, n.rows, kChannels), own = dense_of(part.map, part.rows, count);
      for (int i = 0; i < n.rows; ++i)
        for (int j = 0; j < count; ++j) {
          const double want = whole[static_cast<size_t>(i * kChannels + first + j)];
          if (i >= part.row && i < part.row + part.rows)
            REQUIRE(own[static_cast<size_t>((i - part.row) * count + j)] == Approx(want).margin(1e-6));
          else
            REQUIRE(want == 0.0);
        }
    }
  const auto rows = [](const LinearMap& m, int all) { return columns_of(m, all, 8, 8).rows; };
  const std::vector<Named> kinds = all_kinds();
  for (const Named& n : kinds) {
    CAPTURE(n.name);
    const bool mixes_heads = n.name == "dense" || n.name == "Hadamard over heads";
    CHECK((rows(n.map, n.rows) < n.rows) == !mixes_heads);
  }
}

TEST_CASE("a chain of transforms by head leaves a map by head", "[map][chain]") {
  UnitShape unit;
  unit.head_dim = 16;
  unit.heads = 4;
  const auto map_of = [&](std::initializer_list<const char*> names) {
    UnitSpec spec;
    spec.unit = unit;
    spec.method = "exact";
    spec.knobs = {{"dtype", "f32"}};
    spec.transforms = Json::array();
    for (const char* name : names) spec.transforms.push_back({{"name", name}});
    return make_codec(spec)->plan().map;
  };
  CHECK(std::holds_alternative<HadamardMap>(map_of({"center", "hadamard", "channel_scale"})));
  for (const LinearMap& m : {map_of({"rotation"}), map_of({"channel_scale", "query_metric", "rotation", "hadamard"})}) {
    REQUIRE(std::holds_alternative<BlockMap>(m));
    CHECK(std::get<BlockMap>(m).blocks.size() == 4);
    CHECK(stored_bytes(m) == 4 * 16 * 16 * 4);
  }
}
