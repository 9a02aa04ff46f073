#include <cmath>

#include "core/rng.h"
#include "support/catch.h"
#include "support/codec_rows.h"
#include "support/dummy_codecs.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

double relative_error(const Codec& codec, const Matrix<float>& x, const PlanQuery& query = {}) {
  CodeBlock block;
  codec.encode(x, block, query.state);
  Matrix<float> y(x.rows, x.cols);
  codec.decode(block, y, query);
  double error = 0, power = 0;
  for (size_t i = 0; i < x.storage.size(); ++i) {
    error += std::pow(double{x.storage[i]} - y.storage[i], 2);
    power += std::pow(double{x.storage[i]}, 2);
  }
  return error / power;
}

}  // namespace

TEST_CASE("overlays replace or add, and nothing else changes", "[plan][overlay]") {
  const Matrix<float> x = gaussian(40, 16, 1);
  for (const bool add : {false, true}) {
    const SparseDummy codec(unit_of(16, 1, Role::kValue), 3, add);
    CodeBlock block;
    codec.encode(x, block);
    REQUIRE(block.overlay.size() == 120);
    Matrix<float> with(40, 16), without(40, 16);
    codec.decode(block, with);
    CodeBlock plain = block;
    plain.overlay.clear();
    codec.decode(plain, without);
    std::vector<bool> kept(640, false);
    for (const OverlayEntry& e : block.overlay) {
      kept[static_cast<size_t>(e.token * 16 + e.channel)] = true;
      CHECK(with(e.token, e.channel) == Approx(x(e.token, e.channel)).epsilon(2e-3));
    }
    for (size_t i = 0; i < 640; ++i)
      if (!kept[i]) REQUIRE(with.storage[i] == without.storage[i]);
    CHECK(relative_error(codec, x) < 0.03);
  }
}

TEST_CASE("parameters of a prompt reach encoding and decoding", "[plan][state]") {
  Matrix<float> x = gaussian(64, 8, 2);
  for (int64_t t = 0; t < x.rows; ++t) x(t, 3) += 50;
  const PromptDummy codec(unit_of(8, 1, Role::kValue));
  const auto state = codec.fit(x, x, {});
  CHECK(state->bytes() == 32);
  CHECK(relative_error(codec, x, {-1, state.get()}) < 1e-4);
  CHECK(relative_error(codec, x) > 1e-3);
}

TEST_CASE("levels decode a prefix", "[plan][level]") {
  const Matrix<float> x = gaussian(64, 16, 3);
  const NibbleDummy nibbles(unit_of(16, 1, Role::kKey));
  CHECK(nibbles.plan({0}).terms.size() == 1);
  CHECK(relative_error(nibbles, x, {1}) < 1e-3);
  CHECK(relative_error(nibbles, x, {1}) == relative_error(nibbles, x));
  CHECK(relative_error(nibbles, x, {0}) > 10 * relative_error(nibbles, x, {1}));
  const TableDummy table(unit_of(16, 1, Role::kKey), {});
  CHECK(relative_error(table, x, {0}) > relative_error(table, x, {1}));
}

TEST_CASE("sides of a block are indexed by run and channel group", "[plan][block]") {
  const BlockDummy codec(unit_of(8, 1, Role::kKey), 16, 4, 8);
  CHECK(codec.layout().code_bits_per_block() == 16 * 8 * 8 + 5);
  CHECK(codec.layout().side_bits_per_block() == (16 + 32) * 16);
  CHECK(relative_error(codec, gaussian(64, 8, 4)) < 1e-4);
}

TEST_CASE("a table plan with everything reproduces what was coded", "[plan][table]") {
  // Codewords put together by hand through the definition x = outer + s (inner + y M), against the decoder.
  for (const bool rotate : {false, true}) {
    TableDummy::Options options;
    options.scale_slots = 2;
    options.rotate_last = rotate;
    const TableDummy codec(unit_of(8, 2, Role::kKey), options);
    const Matrix<float> x = gaussian(20, 16, 6);
    CodeBlock block;
    codec.encode(x, block);
    Matrix<float> y(20, 16);
    codec.decode(block, y);
    const DecodePlan plan = codec.plan();
    REQUIRE(plan.table_only());
    for (int64_t t = 0; t < 20; ++t) {
      double code[16] = {};
      for (int s = 0; s < 2; ++s)
        for (int g = 0; g < 4; ++g) {
          const int c = block.fields[0][static_cast<size_t>(t * 8 + s * 4 + g)];
          const auto& words = *std::get<TableTerm>(plan.terms[0]).codewords;
          for (int i = 0; i < 4; ++i) {
            const auto word = [&](int j) { return words[static_cast<size_t>((s * 64 + c) * 4 + j)]; };
            // i Z on pairs (i, i + 2): (x, y) -> (-y, x)
            code[g * 4 + i] += rotate && s == 1 ? (i < 2 ? -word(i + 2) : word(i - 2)) : word(i);
          }
        }
      for (int j = 0; j < 16; ++j) {
        double z = plan.inner_bias[static_cast<size_t>(j)];
        for (int i = 0; i < 16; ++i)
          z += code[i] * std::get<DenseMap>(plan.map).values[static_cast<size_t>(i * 16 + j)];
        const double scale = block.sides[0][static_cast<size_t>(t * 2 + j / 8)];
        CHECK(y(t, j) == Approx(plan.outer_bias[static_cast<size_t>(j)] + scale * z).margin(1e-6));
      }
    }
    CHECK(relative_error(codec, x) < 0.5);
  }
}

TEST_CASE("a plan that contradicts itself is refused", "[plan]") {
  const TableDummy codec(unit_of(16, 1, Role::kKey), {});
  const auto spoiled = [&](const std::function<void(DecodePlan&)>& spoil) {
    DecodePlan plan = codec.plan();
    spoil(plan);
    CHECK_THROWS_AS(check_plan(plan), Error);
  };
  CHECK_NOTHROW(check_plan(codec.plan()));
  spoiled([](DecodePlan& p) { std::get<TableTerm>(p.terms[0]).field = 1; });
  spoiled([](DecodePlan& p) { std::get<TableTerm>(p.terms[0]).slots += 1; });
  spoiled([](DecodePlan& p) { std::get<TableTerm>(p.terms[0]).channel[0] = 16; });
  spoiled([](DecodePlan& p) { std::get<TableTerm>(p.terms[0]).book_of_slot[0] = 2; });
  spoiled([](DecodePlan& p) { std::get<TableTerm>(p.terms[0]).disjoint = true; });
  spoiled([](DecodePlan& p) { p.token_scale_side = 1; });
  spoiled([](DecodePlan& p) { p.outer_bias.pop_back(); });
  spoiled([](DecodePlan& p) { std::get<DenseMap>(p.map).values.pop_back(); });
  spoiled([](DecodePlan& p) { p.map = DiagonalMap{std::vector<float>(15, 1.0f)}; });
  spoiled([](DecodePlan& p) { p.map = GatherMap{16, std::vector<int32_t>(16, 16), {}}; });
  spoiled([](DecodePlan& p) { p.map = GatherMap{15, std::vector<int32_t>(16, 0), {}}; });
  spoiled([](DecodePlan& p) { p.map = BlockMap{{{8, 8, std::vector<float>(64)}}}; });
  spoiled([](DecodePlan& p) { p.map = HadamardMap{16, 6, {}, {}}; });
  spoiled([](DecodePlan& p) { p.map = HadamardMap{16, 32, {}, {}}; });
}

TEST_CASE("books shared by terms are counted once", "[plan]") {
  TableDummy::Options options;
  options.rotate_last = true;
  const TableDummy codec(unit_of(16, 1, Role::kKey), options);
  CHECK(codec.plan().terms.size() == 2);
  CHECK(codec.constant_bytes() == 2 * 64 * 4 * 2 + 16 * 16 * 4 + 2 * 16 * 4);
}
