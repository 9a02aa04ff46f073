#include "core/row_products.h"

#include <vector>

#include "core/rng.h"
#include "support/catch.h"

using namespace vqkv;

namespace {

template <class T>
std::vector<T> random_values(int64_t n, uint64_t key) {
  std::vector<T> v(static_cast<size_t>(n));
  Rng rng(key);
  for (T& x : v) x = static_cast<T>(rng.normal());
  return v;
}

template <class T>
void check_row_product(int64_t rows, int64_t cols) {
  std::vector<T> x = random_values<T>(rows, 1), out = random_values<T>(cols, 2), expected = out;
  x[0] = 0;
  const std::vector<float> m = random_values<float>(rows * cols, 3);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j)
      expected[static_cast<size_t>(j)] += x[static_cast<size_t>(i)] * m[static_cast<size_t>(i * cols + j)];
  add_row_product(x.data(), rows, m.data(), cols, out.data());
  CHECK(out == expected);
}

}  // namespace

TEST_CASE("sums of rows have the bits of the plain loop", "[gemm]") {
  const int64_t cols = GENERATE(1, 5, 16, 64, 100), rows = 7;
  INFO(cols);
  const std::vector<float> m = random_values<float>(rows * cols, 6);
  std::vector<double> out = random_values<double>(cols, 7), expected = out;
  std::vector<const float*> list;
  for (int64_t i = 0; i < rows; ++i) {
    list.push_back(m.data() + i * cols);
    for (int64_t j = 0; j < cols; ++j) expected[static_cast<size_t>(j)] += m[static_cast<size_t>(i * cols + j)];
  }
  add_rows(list.data(), rows, cols, out.data());
  CHECK(out == expected);
}

TEST_CASE("products of single rows have the bits of the plain loops", "[gemm]") {
  const int64_t cols = GENERATE(1, 7, 16, 24, 64, 100, 192);
  INFO(cols);
  check_row_product<float>(64, cols);
  check_row_product<double>(64, cols);
}

TEST_CASE("sums of outer products have the bits of the plain loops", "[gemm]") {
  const int64_t n = GENERATE(1, 5, 8, 31, 64, 80), rows = 33;
  INFO(n);
  const std::vector<double> v = random_values<double>(rows * n, 4), weight = random_values<double>(rows, 5);
  std::vector<double> weighted(static_cast<size_t>(n * n), 0.5), plain = weighted;
  add_outer_products(v.data(), weight.data(), rows, n, weighted.data());
  add_outer_products(v.data(), nullptr, rows, n, plain.data());
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j <= i; ++j) {
      double with = 0.5, without = 0.5;
      for (int64_t r = 0; r < rows; ++r) {
        const double a = v[static_cast<size_t>(r * n + i)], b = v[static_cast<size_t>(r * n + j)];
        with += weight[static_cast<size_t>(r)] * a * b;
        without += a * b;
      }
      REQUIRE(weighted[static_cast<size_t>(i * n + j)] == with);
      REQUIRE(plain[static_cast<size_t>(i * n + j)] == without);
    }
}
