#include "codec/train/scalar_kmeans.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "codec/vq_support.h"
#include "support/catch.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

double cost(const std::vector<float>& x, const std::vector<double>& weight, const std::vector<float>& levels) {
  double sum = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    double least = INFINITY;
    for (const float l : levels) least = std::min(least, std::pow(double{x[i]} - l, 2));
    sum += (weight.empty() ? 1.0 : weight[i]) * least;
  }
  return sum;
}

// Lloyd's iteration until nothing moves.
std::vector<float> lloyd(const std::vector<float>& x, const std::vector<double>& weight, std::vector<float> levels) {
  for (;;) {
    std::vector<double> sum(levels.size(), 0.0), total(levels.size(), 0.0);
    for (size_t i = 0; i < x.size(); ++i) {
      const auto nearest = std::ranges::min_element(levels, {}, [&](float l) { return std::abs(x[i] - l); });
      const auto at = static_cast<size_t>(nearest - levels.begin());
      sum[at] += weight[i] * x[i];
      total[at] += weight[i];
    }
    std::vector<float> moved = levels;
    for (size_t l = 0; l < levels.size(); ++l)
      if (total[l] > 0) moved[l] = static_cast<float>(sum[l] / total[l]);
    if (moved == levels) return levels;
    levels = moved;
  }
}

}  // namespace

// baseline-methods 23
TEST_CASE("k-means of scalars is the best of all Lloyd iterations on a weighted toy", "[kmeans][golden]") {
  const std::vector<float> x = {-.9f, -.85f, -.7f, -.4f, -.35f, -.3f, -.1f, 0, .05f, .2f, .3f, .55f, .6f, .8f, .95f, 1};
  const std::vector<double> weight = {1, 4, .5, 1, 8, 2, 1, .25, 3, 1, 6, 1, 2, .5, 1, 5};
  std::vector<float> best;
  for (size_t a = 0; a < 16; ++a)
    for (size_t b = a + 1; b < 16; ++b)
      for (size_t c = b + 1; c < 16; ++c)
        for (size_t d = c + 1; d < 16; ++d) {
          const std::vector<float> levels = lloyd(x, weight, {x[a], x[b], x[c], x[d]});
          if (best.empty() || cost(x, weight, levels) < cost(x, weight, best)) best = levels;
        }
  const std::vector<float> levels = scalar_kmeans(x, weight, 4);
  REQUIRE(levels.size() == 4);
  CHECK(cost(x, weight, levels) == Approx(cost(x, weight, best)).epsilon(1e-6));
  for (size_t i = 0; i < 4; ++i) CHECK(levels[i] == Approx(best[i]).margin(1e-6));
  // Weights decide: without them the levels are others, and in any order of the values the same.
  CHECK(cost(x, weight, scalar_kmeans(x, {}, 4)) > 1.01 * cost(x, weight, levels));
  const std::vector<float> backwards(x.rbegin(), x.rend());
  const std::vector<double> their(weight.rbegin(), weight.rend());
  for (size_t i = 0; i < 4; ++i) CHECK(scalar_kmeans(backwards, their, 4)[i] == Approx(levels[i]).margin(1e-6));
}

// baseline-methods 1.1
TEST_CASE("k-means of scalars gives the Lloyd-Max levels of a Gaussian", "[kmeans][golden]") {
  // The density on a grid: a sample's own levels wander by 0.02 where the error hardly changes.
  std::vector<float> x;
  std::vector<double> weight;
  double all = 0;
  for (int i = -2000; i <= 2000; ++i) {
    x.push_back(static_cast<float>(i) * .003f);
    weight.push_back(std::exp(-.5 * std::pow(i * .003, 2)));
    all += weight.back();
  }
  const std::array<std::vector<double>, 4> positive = {
      {{.79788},
       {.45278, 1.51042},
       {.24509, .75601, 1.34391, 2.15195},
       {.12840, .38805, .65676, .94234, 1.25623, 1.61805, 2.06902, 2.73259}}};
  const std::array<double, 4> error = {.36338, .11748, .03455, .00950};
  for (int bits = 1; bits <= 4; ++bits) {
    const auto& expected = positive[static_cast<size_t>(bits - 1)];
    const std::vector<float> levels = scalar_kmeans(x, weight, 1 << bits);
    for (size_t i = 0; i < expected.size(); ++i) {
      CAPTURE(bits, i);
      CHECK(levels[expected.size() + i] == Approx(expected[i]).margin(.003));
      CHECK(levels[expected.size() - 1 - i] == Approx(-expected[i]).margin(.003));
    }
    CHECK(cost(x, weight, levels) / all == Approx(error[static_cast<size_t>(bits - 1)]).epsilon(2e-3));
  }
  CHECK(cost(x, weight, scalar_kmeans(x, weight, 32)) / all == Approx(.002505).epsilon(2e-3));
}

// baseline-methods 1.2 and vq-methods r.9: a coordinate of a random unit vector times sqrt(d), whose density is that of
// (1 - u^2)^((d - 3) / 2), u its share of the sphere's radius.
TEST_CASE("k-means of scalars gives the best levels of a coordinate of a unit vector", "[kmeans][golden]") {
  struct Row {
    int d;
    std::vector<double> positive;
    double error;
  };
  for (const Row& row :
       {Row{32, {.4514, 1.4896}, .1116}, Row{32, {.2424, .7453, 1.3150, 2.0719}, .03226}, Row{64, {.8010}, .35839},
        Row{64, {.4521, 1.5000}, .11453}, Row{64, {.2438, .7507, 1.3293, 2.1113}, .03339},
        Row{64, {.1274, .3847, .6505, .9319, 1.2394, 1.5908, 2.0233, 2.6464}, .00913}, Row{96, {.4523, 1.5035}, .11551},
        Row{96, {.2442, .7524, 1.3342, 2.1247}, .03377}, Row{128, {.7994}, .36089}, Row{128, {.4525, 1.5052}, .1160},
        Row{128, {.2444, .7533, 1.3366, 2.1315}, .03397},
        Row{128, {.1279, .3864, .6536, .9371, 1.2478, 1.6043, 2.0459, 2.6889}, .00931}}) {
    std::vector<float> x;
    std::vector<double> weight;
    double all = 0;
    for (int i = -1999; i <= 1999; ++i) {
      x.push_back(static_cast<float>(i) * .0025f);
      const double u = i * .0025 / std::sqrt(row.d);
      weight.push_back(std::pow(std::max(0.0, 1 - u * u), .5 * (row.d - 3)));
      all += weight.back();
    }
    const size_t half = row.positive.size();
    const std::vector<float> levels = scalar_kmeans(x, weight, static_cast<int>(2 * half));
    for (size_t i = 0; i < half; ++i) {
      CAPTURE(row.d, half, i);
      CHECK(levels[half + i] == Approx(row.positive[i]).margin(.003));
      CHECK(levels[half - 1 - i] == Approx(-row.positive[i]).margin(.003));
    }
    CHECK(cost(x, weight, levels) / all == Approx(row.error).epsilon(2e-3));
  }
}

TEST_CASE("pooled values give levels that no Lloyd iteration makes noticeably better", "[kmeans]") {
  const Matrix<float> m = gaussian(6000, 1, 8);
  std::vector<float> x;
  std::vector<double> weight;
  for (const float v : m.storage) {
    x.push_back(v * v * v);  // heavy tails
    weight.push_back(1 + std::abs(v));
  }
  for (const int levels : {4, 16}) {
    const std::vector<float> ours = scalar_kmeans(x, weight, levels);
    CHECK(cost(x, weight, ours) < 1.001 * cost(x, weight, lloyd(x, weight, ours)));
  }
}

TEST_CASE("few distinct values are the levels, and those without weight count for nothing", "[kmeans]") {
  CHECK(scalar_kmeans(std::vector<float>{3, 1, 3, 1, 2}, {}, 4) == std::vector<float>{1, 2, 3, 3});
  CHECK(scalar_kmeans(std::vector<float>{5}, {}, 2) == std::vector<float>{5, 5});
  const std::vector<double> weight = {1, 0, 1, 0, 0};
  CHECK(scalar_kmeans(std::vector<float>{3, 100, 1, -100, 2}, weight, 2) == std::vector<float>{1, 3});
  const std::vector<float> same(5000, .25f);  // more values than cells, between equal ends
  CHECK(scalar_kmeans(same, {}, 2) == std::vector<float>{.25f, .25f});
}

TEST_CASE("the nearest level, and the lower one in the middle between two", "[kmeans]") {
  const std::vector<float> levels = {-1, 0, 0, 2};
  CHECK(nearest_level(levels, -9) == 0);
  CHECK(nearest_level(levels, -.5) == 0);
  CHECK(nearest_level(levels, -.49) == 1);
  CHECK(nearest_level(levels, 0) == 1);
  CHECK(nearest_level(levels, 1) < 3);
  CHECK(nearest_level(levels, 1.01) == 3);
  CHECK(nearest_level(levels, 9) == 3);
}
