#include "generation/logits.h"

#include <cmath>
#include <limits>
#include <vector>

#include "core/error.h"
#include "core/rng.h"
#include "support/catch.h"

using namespace vqkv;

namespace {

struct Exact {
  double nll, log_sum, kl;
};

Exact brute_force(const std::vector<float>& base, const std::vector<float>& test, int truth) {
  const auto lse = [](const std::vector<float>& x) {
    long double m = x[0], s = 0;
    for (const float v : x) m = std::max<long double>(m, v);
    for (const float v : x) s += std::exp(static_cast<long double>(v) - m);
    return m + std::log(s);
  };
  const long double lb = lse(base), lt = lse(test);
  long double kl = 0;
  for (size_t i = 0; i < base.size(); ++i) kl += std::exp(base[i] - lb) * ((base[i] - lb) - (test[i] - lt));
  return {static_cast<double>(lb - base[static_cast<size_t>(truth)]), static_cast<double>(lb), static_cast<double>(kl)};
}

}  // namespace

TEST_CASE("logit facts and KL agree with long double over odd vocabulary sizes") {
  Rng rng(11);
  for (const size_t vocab : {1u, 7u, 1023u, 1025u, 49152u}) {
    for (const double noise : {0.0, 1e-4, 0.01, 1.0}) {
      std::vector<float> base(vocab), test(vocab);
      for (size_t i = 0; i < vocab; ++i) {
        base[i] = static_cast<float>(4 * rng.normal() + 17);
        test[i] = static_cast<float>(base[i] + noise * rng.normal() - 3);  // a shift changes nothing
      }
      const int truth = static_cast<int>(rng.below(vocab));
      const Exact e = brute_force(base, test, truth);
      const LogitFacts b = logit_facts(base.data(), static_cast<int64_t>(vocab), truth);
      const LogitFacts t = logit_facts(test.data(), static_cast<int64_t>(vocab), truth);
      CHECK(b.log_sum == Approx(e.log_sum).epsilon(1e-7));
      CHECK(b.nll == Approx(e.nll).margin(1e-5));
      const double kl = kl_divergence(base.data(), b.log_sum, test.data(), t.log_sum, static_cast<int64_t>(vocab));
      // float differences of logits near 20 round at 1e-6; they enter with weights that sum to 1
      CHECK(std::fabs(kl - e.kl) <= 2e-6 + 1e-5 * e.kl);
    }
  }
}

TEST_CASE("equal logits have no divergence, and ties go to the lowest index") {
  std::vector<float> x(5000, 1.5f);
  x[77] = x[4000] = 9;
  const LogitFacts f = logit_facts(x.data(), 5000, 3);
  CHECK(f.top == 77);
  CHECK(kl_divergence(x.data(), f.log_sum, x.data(), f.log_sum, 5000) == 0.0);
}

TEST_CASE("logits that are not finite are refused, and no divergence comes out of a NaN") {
  const float infinity = std::numeric_limits<float>::infinity();
  for (const float bad : {std::nanf(""), infinity, -infinity})
    for (const size_t at : {size_t{0}, size_t{1500}, size_t{4999}}) {
      std::vector<float> x(5000, 1.5f);
      x[at] = bad;
      CHECK_THROWS_AS(logit_facts(x.data(), 5000, 3), Error);
    }
  const std::vector<float> x(5000, 1.5f);
  CHECK(std::isnan(kl_divergence(x.data(), 1.5, x.data(), std::nan(""), 5000)));
}
