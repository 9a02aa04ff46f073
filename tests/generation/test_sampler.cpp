#include "generation/generate.h"
#include "generation/sampler.h"

#include <cmath>
#include <limits>
#include <map>

#include "core/error.h"
#include "support/catch.h"

using namespace vqkv;

namespace {

std::map<int32_t, double> frequencies(const SamplingOptions& options, std::span<const float> logits, int draws) {
  Sampler sampler(options);
  std::map<int32_t, double> count;
  for (int i = 0; i < draws; ++i) count[sampler.next(logits)] += 1.0 / draws;
  return count;
}

}  // namespace

TEST_CASE("greedy takes the largest logit, the lowest id on ties") {
  Sampler greedy{SamplingOptions{}};
  CHECK(greedy.next(std::vector<float>{0, 3, 1, 3}) == 1);
  CHECK(greedy.next(std::vector<float>{-5}) == 0);
}

TEST_CASE("sampling follows the softmax at the temperature") {
  const std::vector<float> logits{std::log(1.0f), std::log(2.0f), std::log(5.0f)};
  const int draws = 40000;  // standard error of a frequency at most 0.0025
  auto f = frequencies({.temperature = 1}, logits, draws);
  CHECK(f[0] == Approx(0.125).margin(0.01));
  CHECK(f[1] == Approx(0.25).margin(0.01));
  CHECK(f[2] == Approx(0.625).margin(0.01));
  f = frequencies({.temperature = 0.5}, logits, draws);  // p^2: 1, 4, 25
  CHECK(f[0] == Approx(1.0 / 30).margin(0.01));
  CHECK(f[2] == Approx(25.0 / 30).margin(0.01));
}

TEST_CASE("top-k and top-p cut the tail, the rest is renormalised") {
  const std::vector<float> logits{std::log(5.0f), std::log(1.0f), std::log(3.0f), std::log(1.0f)};
  auto f = frequencies({.temperature = 1, .top_k = 2}, logits, 20000);
  CHECK(f.size() == 2);
  CHECK(f[0] == Approx(5.0 / 8).margin(0.015));
  f = frequencies({.temperature = 1, .top_k = 3}, logits, 20000);  // of two equal logits the lower id stays
  CHECK(f.size() == 3);
  CHECK(f.count(1) == 1);
  f = frequencies({.temperature = 1, .top_p = 0.6}, logits, 20000);  // 0.5 is short of it, 0.8 reaches it
  CHECK(f.size() == 2);
  CHECK(f[2] == Approx(3.0 / 8).margin(0.015));
  f = frequencies({.temperature = 1, .top_p = 0.01}, logits, 100);
  CHECK(f.size() == 1);
}

TEST_CASE("the same seed draws the same tokens, what is out of range is refused") {
  const std::vector<float> logits{0, 1, 2, 3};
  Sampler a({.temperature = 1, .seed = 7}), b({.temperature = 1, .seed = 7}), c({.temperature = 1, .seed = 8});
  int differ = 0;
  for (int i = 0; i < 200; ++i) {
    const int32_t token = a.next(logits);
    CHECK(token == b.next(logits));
    differ += token != c.next(logits);
  }
  CHECK(differ > 0);
  CHECK_THROWS_AS(Sampler({.temperature = -1}), Error);
  CHECK_THROWS_AS(Sampler({.temperature = 1, .top_k = -1}), Error);
  CHECK_THROWS_AS(Sampler({.temperature = 1, .top_p = 0}), Error);
  CHECK_THROWS_AS(a.next(std::vector<float>{0, std::numeric_limits<float>::quiet_NaN()}), Error);
}

TEST_CASE("the first divergence of two generations: a token, an earlier end, another end, or none") {
  const auto made = [](std::vector<int32_t> tokens, int32_t stop) {
    Generated g;
    g.tokens = std::move(tokens);
    g.stop_token = stop;
    return g;
  };
  const Generated a = made({1, 2, 3}, 9);
  CHECK(a.with_stop() == std::vector<int32_t>{1, 2, 3, 9});
  CHECK(first_divergence(a, a) == -1);
  CHECK(first_divergence(a, made({1, 5, 3}, 9)) == 1);
  CHECK(first_divergence(a, made({1, 2}, 9)) == 2);
  CHECK(first_divergence(a, made({1, 2, 3}, 8)) == 3);
  CHECK(first_divergence(a, made({1, 2, 3}, -1)) == 3);
  CHECK(first_divergence(made({}, -1), made({}, -1)) == -1);
}
