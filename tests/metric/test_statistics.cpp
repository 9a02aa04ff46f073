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

namespace {

// Clusters of 20 correlated positions each: cluster effect by `draw`, noise a tenth of a normal's.
template <class Draw>
void correlated(int clusters, Rng& rng, std::vector<double>& x, std::vector<int32_t>& cluster, Draw draw) {
  x.clear();
  cluster.clear();
  for (int c = 0; c < clusters; ++c) {
    const double effect = draw(rng);
    for (int i = 0; i < 20; ++i) {
      x.push_back(effect + 0.1 * rng.normal());
      cluster.push_back(c);
    }
  }
}

}  // namespace

TEST_CASE("sign flips on paper: p, the interval of subset means, clusters of unequal size") {
  // Six clusters of one sign: the least p that six can give, and an interval from the least to the greatest mean.
  const std::vector<double> six{1, 2, 3, 4, 5, 6};
  const std::vector<int32_t> own{0, 1, 2, 3, 4, 5};
  SignFlip t = sign_flip(six, own, Rng(1));
  CHECK(t.clusters == 6);
  CHECK(t.p == 2.0 / 64);
  CHECK(t.interval.low == 1);
  CHECK(t.interval.high == 6);
  // -1, 2, 4: of the subsets {}, {-1} and no others sum to zero or below, so p = 2 * 2 / 8.
  t = sign_flip(std::vector<double>{-1, 2, 4}, std::vector<int32_t>{0, 1, 2}, Rng(1));
  CHECK(t.p == 0.5);
  CHECK(std::isnan(t.interval.low));  // three clusters never give 95 %
  // A cluster is its positions' sum: 3 * 1 against -2.
  t = sign_flip(std::vector<double>{1, 1, 1, -2}, std::vector<int32_t>{0, 0, 0, 1}, Rng(1));
  CHECK(t.p == 1);
  // Equal tracks: nothing is as likely as nothing. Tenths that cancel on paper cancel here.
  CHECK(sign_flip(std::vector<double>(6, 0.0), own, Rng(1)).p == 1);
  CHECK(sign_flip(std::vector<double>{0.1, 0.2, -0.3}, std::vector<int32_t>{0, 1, 2}, Rng(1)).p == 1);
  CHECK(clusters_to_reach(0.05) == 6);
  CHECK(clusters_to_reach(0.05 / 126) == 13);
  CHECK(sign_flip({}, {}, Rng(1)).p == 1);
}

TEST_CASE("Holm's correction") {
  const std::vector<double> p{0.04, 0.01, 0.5, 0.02};
  const auto h = holm(p);
  CHECK(h[1] == Approx(0.04));
  CHECK(h[3] == Approx(0.06));
  CHECK(h[0] == Approx(0.08));
  CHECK(h[2] == Approx(0.5));
  CHECK(holm(std::vector<double>{0.9, 0.8})[0] == 1);  // never above one
}

TEST_CASE("under the null no more verdicts than the level, whatever the tails, intervals hold the truth") {
  const auto normal = [](Rng& r) { return r.normal(); };
  const auto heavy = [](Rng& r) { return r.normal() / (0.05 + std::fabs(r.normal())); };
  const auto two_sizes = [](Rng& r) { return (r.below(2) ? 1 : -1) * (r.below(5) ? 0.5 : 5.0); };
  std::vector<double> x;
  std::vector<int32_t> cluster;
  for (const int k : {2, 3, 4, 6, 12, 18}) {
    const int trials = k > 12 ? 60 : 2000;
    for (int kind = 0; kind < 3; ++kind) {
      int refused = 0, missed = 0;
      for (int t = 0; t < trials; ++t) {
        Rng rng(static_cast<uint64_t>(1000 * kind + t));
        if (kind == 0)
          correlated(k, rng, x, cluster, normal);
        else if (kind == 1)
          correlated(k, rng, x, cluster, heavy);
        else
          correlated(k, rng, x, cluster, two_sizes);
        const SignFlip s = sign_flip(x, cluster, rng.split(1));
        refused += s.p <= 0.05;
        missed += s.interval.low > 0 || s.interval.high < 0;
        CHECK(std::isnan(s.interval.low) == (k < 6));
        CHECK((s.p <= 0.05) == (s.interval.low > 0 || s.interval.high < 0));  // one test, seen from both sides
      }
      INFO(k << " clusters, kind " << kind);
      // Nominal 5 %, and three standard errors of a count for the luck of the seed.
      CHECK(refused <= 0.05 * trials + 3 * std::sqrt(0.05 * 0.95 * trials));
      if (k < 6) CHECK(refused == 0);
      if (k == 12) CHECK(refused > 0.02 * trials);  // and it is no test that never refuses
    }
  }
}

TEST_CASE("errors over clusters see the correlation inside them") {
  Rng rng(7);
  std::vector<double> x;
  std::vector<int32_t> cluster;
  correlated(12, rng, x, cluster, [](Rng& r) { return r.normal(); });
  CHECK(cluster_error(x, cluster) > 3 * mean_error(x).error);
}

TEST_CASE("paired ratios are of the rounds that both have") {
  const std::vector<double> x{2, 6, 5}, y{4, 3};
  CHECK(paired_ratios(x, y) == std::vector<double>{0.5, 2});
  CHECK(paired_ratios(x, {}).empty());
}
