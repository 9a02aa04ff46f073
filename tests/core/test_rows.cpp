#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "core/rng.h"
#include "core/rows.h"
#include "support/catch.h"

using namespace vqkv;

namespace {

std::vector<float> numbers(int64_t n, double scale, uint64_t key) {
  Rng rng(key);
  std::vector<float> x(static_cast<size_t>(n));
  for (float& v : x) v = static_cast<float>(scale * rng.normal());
  return x;
}

}  // namespace

TEST_CASE("rows of attention by vectors are those of the standard library, at every length", "[rows]") {
  for (int64_t n = 1; n <= 70; ++n) {
    CAPTURE(n);
    const std::vector<float> a = numbers(n, 9, 1), b = numbers(n, 9, 2);
    std::vector<float> p(a.size()), q(a.size());
    softmax(a.data(), n, p.data());
    softmax(b.data(), n, q.data());
    const float top = *std::max_element(a.begin(), a.end());
    CHECK(largest(a.data(), n) == top);
    double exp_sum = 0, of_rounded = 0, p_sum = 0, kl = 0, l1 = 0;
    for (const float v : a) exp_sum += std::exp(double{v} - top);
    for (const float v : a) of_rounded += std::exp(double{v - top});
    CHECK(sum_of_exp(a.data(), n, top) == Approx(exp_sum).epsilon(1e-15));
    for (size_t j = 0; j < a.size(); ++j) {
      CHECK(p[j] == Approx(std::exp(double{a[j] - top}) / of_rounded).epsilon(4e-7));
      p_sum += p[j];
      kl += p[j] * (double{a[j]} - b[j] - 0.25);
      l1 += std::fabs(double{p[j]} - q[j]);
    }
    CHECK(sum_of(p.data(), n) == Approx(p_sum).epsilon(1e-15));
    const RowDistance distance = row_distance(p.data(), q.data(), a.data(), b.data(), 0.25, n);
    CHECK(distance.kl == Approx(kl).epsilon(1e-12).margin(1e-12));
    CHECK(distance.l1 == Approx(l1).epsilon(1e-12));
  }
}

TEST_CASE("exponentials of a row: far logits vanish, unseen ones weigh nothing, a NaN stays one", "[rows]") {
  for (const int64_t n : {3, 40}) {
    CAPTURE(n);
    for (int64_t at = 0; at < n; ++at) {
      std::vector<float> s(static_cast<size_t>(n), 1.0f), p(s);
      s[static_cast<size_t>(at)] = -std::numeric_limits<float>::infinity();
      softmax(s.data(), n, p.data());
      CHECK(p[static_cast<size_t>(at)] == 0);
      CHECK(sum_of(p.data(), n) == Approx(1).epsilon(1e-6));
      CHECK(sum_of_exp(s.data(), n, 1) == Approx(n - 1).epsilon(1e-14));
      s[static_cast<size_t>(at)] = -1e4f;
      CHECK(sum_of_exp(s.data(), n, 1) == Approx(n - 1).epsilon(1e-14));
      s[static_cast<size_t>(at)] = 601;
      CHECK(sum_of_exp(s.data(), n, 1) == Approx(std::exp(600.0)).epsilon(1e-14));
      s[static_cast<size_t>(at)] = std::numeric_limits<float>::quiet_NaN();
      CHECK(std::isnan(sum_of_exp(s.data(), n, 1)));
      softmax(s.data(), n, p.data());
      for (const float v : p) CHECK(std::isnan(v));
    }
  }
}
