#include "core/rope.h"

#include <cmath>
#include <numbers>
#include <thread>

#include "core/error.h"
#include "core/json.h"
#include "core/rng.h"
#include "support/catch.h"

using namespace vqkv;

namespace {

Matrix<float> random_rows(int64_t rows, int64_t cols) {
  Matrix<float> x(rows, cols);
  Rng rng(1);
  for (float& v : x.storage) v = static_cast<float>(rng.normal());
  return x;
}

}  // namespace

TEST_CASE("RoPE and its inverse, with an attention factor and channels that pass through", "[rope]") {
  for (const double factor : {1.0, 1.25, 0.5}) {
    RopeFacts facts = RopeFacts::plain(16, 12, 100.0);
    facts.attention_factor = factor;
    const RopeTable table(facts);
    const Matrix<float> x = random_rows(40, 32);
    Matrix<float> y = x;
    std::vector<int32_t> positions;
    for (int32_t t = 0; t < 40; ++t) positions.push_back(t * 37);
    rope_apply(table, positions.data(), y);
    for (int64_t t = 0; t < 40; ++t)
      for (int64_t h = 0; h < 32; h += 16) {
        for (int64_t p = 0; p < 6; ++p) {
          const double angle = positions[static_cast<size_t>(t)] * std::pow(100.0, -2.0 * static_cast<double>(p) / 12),
                       a = x(t, h + p), b = x(t, h + p + 6);
          CHECK(y(t, h + p) == Approx(factor * (a * std::cos(angle) - b * std::sin(angle))).margin(1e-6));
          CHECK(y(t, h + p + 6) == Approx(factor * (a * std::sin(angle) + b * std::cos(angle))).margin(1e-6));
        }
        for (int64_t c = 12; c < 16; ++c) CHECK(y(t, h + c) == x(t, h + c));
      }
    rope_apply(table, positions.data(), y, true);
    for (size_t i = 0; i < x.storage.size(); ++i) CHECK(y.storage[i] == Approx(x.storage[i]).margin(2e-6));
  }
}

TEST_CASE("rows of a RoPE table are made once, whichever threads ask first", "[rope]") {
  const RopeFacts facts = RopeFacts::plain(16, 16, 10000);
  for (int round = 0; round < 20; ++round) {
    const RopeTable table(facts), alone(facts);
    constexpr int64_t kPositions = 20000;
    std::vector<std::vector<const float*>> seen(4, std::vector<const float*>(kPositions));
    std::vector<std::thread> threads;
    for (size_t i = 0; i < seen.size(); ++i)
      threads.emplace_back([&, i] {
        for (int64_t t = 0; t < kPositions; ++t) {
          const int64_t position = (t * 7919 + static_cast<int64_t>(i) * 1031) % kPositions;
          const float* row = table.row(position);
          seen[i][static_cast<size_t>(position)] = row[0] <= 1.0f ? row : nullptr;
        }
      });
    for (std::thread& t : threads) t.join();
    bool same = true;
    for (int64_t t = 0; t < kPositions; ++t) {
      for (const auto& rows : seen) same = same && rows[static_cast<size_t>(t)] == table.row(t);
      same = same && std::equal(table.row(t), table.row(t) + 16, alone.row(t));
    }
    REQUIRE(same);
  }
}

TEST_CASE("YaRN keeps fast pairs, divides slow ones, and ramps between", "[rope]") {
  // 32 turns within 4096 tokens are pair 16.4 of 64, one turn is pair 40.5.
  RopeFacts f = RopeFacts::plain(128, 128, 1e4), plain = f;
  const auto pair_of = [](double turns) {
    return 128 * std::log(4096 / (turns * 2 * std::numbers::pi)) / (2 * std::log(1e4));
  };
  f.apply_yarn({.factor = 8, .original_context = 4096});
  CHECK(f.scaling == "yarn");
  CHECK(f.attention_factor == Approx(0.1 * std::log(8.0) + 1));
  const double low = std::floor(pair_of(32)), high = std::ceil(pair_of(1));
  REQUIRE((low > 5 && high < 60));
  for (size_t p = 0; p < 64; ++p) {
    const double share = std::min(1.0, std::max(0.0, (static_cast<double>(p) - low) / (high - low)));
    CHECK(f.inverse_frequency[p] == Approx(plain.inverse_frequency[p] * (share / 8 + 1 - share)).epsilon(1e-12));
  }
  CHECK(RopeFacts::yarn_scale(1) == 1);
  CHECK(RopeFacts::yarn_scale(0.5) == 1);
  CHECK(RopeFacts::yarn_scale(4, 2) == Approx(0.2 * std::log(4.0) + 1));
  // A ramp of no width is a step.
  RopeFacts step = plain;
  step.apply_yarn({.factor = 8, .original_context = 6, .beta_fast = 32, .beta_slow = 1});
  for (size_t p = 1; p < 64; ++p) CHECK(step.inverse_frequency[p] == Approx(plain.inverse_frequency[p] / 8));
}

TEST_CASE("RoPE facts keep their attention factor, and one that can't be undone is refused", "[rope]") {
  RopeFacts f = RopeFacts::plain(8, 8, 1000);
  f.apply_yarn({.factor = 4, .original_context = 32});
  CHECK(RopeFacts::from_json(f.to_json()).attention_factor == f.attention_factor);
  for (const double bad : {0.0, -1.0}) {
    Json j = f.to_json();
    j["attention_factor"] = bad;
    CHECK_THROWS_WITH(RopeFacts::from_json(j), Catch::Contains("attention_factor"));
  }
}

TEST_CASE("the transposed rotation is the adjoint, with an attention factor and channels that pass through", "[rope]") {
  for (const double factor : {1.0, 1.25}) {
    RopeFacts facts = RopeFacts::plain(16, 12, 100.0);
    facts.attention_factor = factor;
    const RopeTable table(facts);
    std::vector<int32_t> positions(40);
    for (int32_t t = 0; t < 40; ++t) positions[static_cast<size_t>(t)] = t * 37;
    const Matrix<float> x = random_rows(40, 32);
    Matrix<float> y = x, rotated = x;
    for (float& v : y.storage) v = v * v - 1;  // another matrix
    Matrix<float> back = y;
    rope_apply(table, positions.data(), rotated);
    rope_transpose(table, positions.data(), back);
    for (int64_t t = 0; t < 40; ++t) {
      double forward = 0, backward = 0;  // (R x) . y = x . (R^T y), row by row
      for (int64_t c = 0; c < 32; ++c) {
        forward += double{rotated(t, c)} * double{y(t, c)};
        backward += double{x(t, c)} * double{back(t, c)};
      }
      CHECK(forward == Approx(backward).margin(1e-4));
    }
    for (int64_t t = 0; t < 40; ++t) CHECK(back(t, 13) == y(t, 13));
  }
}
