#include "metric/statistics.h"

#include <cmath>

#include "support/catch.h"

using namespace vqkv;

TEST_CASE("mean and its error") {
  const std::vector<double> x{1, 2, 3, 4};
  const MeanError m = mean_error(x);
  CHECK(m.mean == Approx(2.5));
  CHECK(m.error == Approx(std::sqrt(5.0 / 3.0) / 2.0));
  CHECK(mean_error(std::vector<double>{7}).error == 0);
}

TEST_CASE("quantiles interpolate between order statistics") {
  const std::vector<double> x{4, 1, 3, 2};
  CHECK(quantile(x, 0) == 1);
  CHECK(quantile(x, 1) == 4);
  CHECK(quantile(x, 0.5) == Approx(2.5));
}

TEST_CASE("Spearman ignores monotone maps and averages ties") {
  const std::vector<double> a{1, 2, 3, 4, 5}, b{1, 8, 27, 64, 125}, c{5, 4, 3, 2, 1};
  CHECK(spearman(a, b) == Approx(1));
  CHECK(spearman(a, c) == Approx(-1));
  CHECK(spearman(std::vector<double>{1, 1, 2}, std::vector<double>{1, 2, 3}) == Approx(std::sqrt(3.0) / 2));
  CHECK(std::isnan(spearman(std::vector<double>{1, 1}, std::vector<double>{1, 2})));
}

TEST_CASE("the cluster bootstrap covers the true mean about as often as it says") {
  // 12 clusters of 50 correlated positions: cluster effect N(0, 1), noise N(0, 0.1).
  int covered = 0;
  const int trials = 200;
  for (int t = 0; t < trials; ++t) {
    Rng rng(static_cast<uint64_t>(100 + t));
    std::vector<double> x;
    std::vector<int32_t> cluster;
    for (int c = 0; c < 12; ++c) {
      const double effect = rng.normal();
      for (int i = 0; i < 50; ++i) {
        x.push_back(effect + 0.1 * rng.normal());
        cluster.push_back(c);
      }
    }
    const Interval ci = cluster_bootstrap(x, cluster, rng.split(1), 400);
    covered += ci.low <= 0 && 0 <= ci.high;
    CHECK(cluster_error(x, cluster) > 3 * mean_error(x).error);  // the naive error ignores the correlation
  }
  CHECK(covered > 0.85 * trials);  // percentile intervals of 12 clusters are a little short of 95 %
  CHECK(std::isnan(cluster_bootstrap(std::vector<double>{1, 2}, std::vector<int32_t>{0, 0}, Rng(1)).low));
}
