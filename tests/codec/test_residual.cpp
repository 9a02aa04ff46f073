#include "codec/train/residual.h"

#include <cmath>
#include <numeric>
#include <vector>

#include "codec/train/beam.h"
#include "codec/vq_support.h"
#include "core/thread_pool.h"
#include "support/catch.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

double mean_error(const ResidualQuantizer& q, const Matrix<float>& x) {
  std::vector<uint16_t> codes(static_cast<size_t>(x.rows * q.stages()));
  std::vector<float> error(static_cast<size_t>(x.rows));
  q.encode(x, codes.data(), error.data());
  return std::accumulate(error.begin(), error.end(), 0.0) / static_cast<double>(x.rows * x.cols);
}

ResidualOptions small(int stages, int64_t entries, int beam = 1, int refine = 0) {
  ResidualOptions o;
  o.stages = stages;
  o.entries = entries;
  o.beam = beam;
  o.refine = refine;
  o.kmeans = {15, 256};
  return o;
}

// The best code of every row, by trying all.
std::vector<double> exhaustive(const Matrix<float>& x, const std::vector<Matrix<float>>& books) {
  std::vector<double> best(static_cast<size_t>(x.rows), 1e300);
  const int64_t entries = books[0].rows;
  int64_t all = 1;
  for (size_t i = 0; i < books.size(); ++i) all *= entries;
  for (int64_t r = 0; r < x.rows; ++r)
    for (int64_t code = 0; code < all; ++code) {
      double sum = 0;
      for (int64_t k = 0; k < x.cols; ++k) {
        double v = x(r, k);
        int64_t rest = code;
        for (const auto& book : books) {
          v -= book(rest % entries, k);
          rest /= entries;
        }
        sum += v * v;
      }
      best[static_cast<size_t>(r)] = std::min(best[static_cast<size_t>(r)], sum);
    }
  return best;
}

}  // namespace

TEST_CASE("greedy residual coding takes the nearest codeword of each stage", "[residual]") {
  const auto x = gaussian(200, 8, 1);
  const auto q = train_residual(gaussian(3000, 8, 2), {}, small(4, 16), Rng(1)).quantizer;
  std::vector<uint16_t> codes(200 * 4);
  std::vector<float> error(200);
  q.encode(x, codes.data(), error.data());
  for (int64_t r = 0; r < 200; ++r) {
    std::vector<float> rest(x.row(r), x.row(r) + 8);
    for (int i = 0; i < 4; ++i) {
      const auto& book = q.books()[static_cast<size_t>(i)];
      int best = -1;
      double least = 1e300;
      for (int64_t s = 0; s < 16; ++s) {
        double d = 0;
        for (int64_t k = 0; k < 8; ++k)
          d +=
              (double{rest[static_cast<size_t>(k)]} - book(s, k)) * (double{rest[static_cast<size_t>(k)]} - book(s, k));
        if (d < least) {
          least = d;
          best = static_cast<int>(s);
        }
      }
      REQUIRE(codes[static_cast<size_t>(r * 4 + i)] == best);
      for (int64_t k = 0; k < 8; ++k) rest[static_cast<size_t>(k)] -= book(best, k);
      if (i == 3) CHECK(error[static_cast<size_t>(r)] == Approx(least).margin(1e-5));
    }
  }
}

TEST_CASE("a beam as wide as the code space finds the optimum", "[residual]") {
  const auto x = gaussian(60, 6, 3);
  const auto books = train_residual(gaussian(2000, 6, 4), {}, small(3, 4), Rng(1)).quantizer.books();
  const auto best = exhaustive(x, books);
  const ResidualQuantizer wide(books, 16);  // 4 * 4 partial sums before the last stage
  std::vector<uint16_t> codes(60 * 3);
  std::vector<float> error(60);
  wide.encode(x, codes.data(), error.data());
  for (size_t r = 0; r < 60; ++r) CHECK(error[r] == Approx(best[r]).margin(1e-5));
}

TEST_CASE("beams gain on a Gaussian about what they should", "[residual]") {
  // 8 x 256 on N(0, 1), d = 32: 0.128 greedy, -12 / -19 / -24 % for beams 2 / 4 / 8. Here 4 x 64 on d = 16.
  const auto books = train_residual(gaussian(16384, 16, 5), {}, small(4, 64), Rng(1)).quantizer.books();
  const auto x = gaussian(2000, 16, 6);
  const double greedy = mean_error(ResidualQuantizer(books, 1), x);
  double last = greedy;
  std::vector<double> gain;
  for (const int beam : {2, 4, 8}) {
    const double now = mean_error(ResidualQuantizer(books, beam), x);
    CHECK(now < last);
    gain.push_back(1 - now / greedy);
    last = now;
  }
  INFO("greedy " << greedy << ", gains " << gain[0] << " " << gain[1] << " " << gain[2]);
  CHECK(gain[0] > 0.05);
  CHECK(gain[1] > 0.10);
  CHECK(gain[2] > 0.14);
  CHECK(gain[2] < 0.35);
}

TEST_CASE("tables and direct scoring are the same search", "[residual]") {
  // 2 stages of 1024 are under the limit of tables, 5 are over it; books of zeros contribute nothing, code 0 by the
  // rule of ties. Tables hold halves, so near ties may turn, but the distortion may not.
  const auto x = gaussian(300, 12, 7, 5.0);
  std::vector<Matrix<float>> books;
  for (uint64_t i = 0; i < 5; ++i)
    books.push_back(i < 2 ? gaussian(1024, 12, 20 + i, i == 0 ? 5.0 : 0.0) : Matrix<float>(1024, 12));
  const BeamEncoder table({books[0], books[1]}, 5), direct(books, 5);
  REQUIRE(table.uses_tables());
  REQUIRE(!direct.uses_tables());
  std::vector<uint16_t> a(300 * 2), b(300 * 5);
  table.encode_rows(x, a.data(), 2, 1);
  direct.encode_rows(x, b.data(), 5, 1);
  const auto error = [&](size_t r, int first, int second) {
    double sum = 0;
    for (int64_t k = 0; k < 12; ++k)
      sum += std::pow(double{x(static_cast<int64_t>(r), k)} - books[0](first, k) - books[1](second, k), 2);
    return sum;
  };
  int differ = 0;
  double with_table = 0, without = 0;
  for (size_t r = 0; r < 300; ++r) {
    differ += a[r * 2] != b[r * 5] || a[r * 2 + 1] != b[r * 5 + 1];
    with_table += error(r, a[r * 2], a[r * 2 + 1]);
    without += error(r, b[r * 5], b[r * 5 + 1]);
    for (size_t i = 2; i < 5; ++i) CHECK(b[r * 5 + i] == 0);
  }
  CHECK(differ <= 3);
  CHECK(with_table == Approx(without).epsilon(1e-4));
}

TEST_CASE("the unit of the tables follows the books, however large or small", "[residual]") {
  for (const float scale : {1e-12f, 1.0f, 3e4f, 1e12f}) {
    auto x = gaussian(500, 8, 30);
    for (float& v : x.storage) v *= scale;
    ResidualOptions options = small(3, 16, 4);
    options.stored_as = DType::kF32;
    const auto q = train_residual(x, {}, options, Rng(1)).quantizer;
    CHECK(mean_error(q, x) / (double{scale} * scale) < 0.25);
  }
}

TEST_CASE("a row's residual codes depend on neither threads nor neighbours", "[residual]") {
  for (const int64_t width : {16, 4900}) {
    const int64_t rows = width > 1000 ? 70 : 1500;
    const auto x = gaussian(rows, width, 8);
    for (const int beam : {1, 4}) {
      const int before = thread_count();
      set_thread_count(1);
      const auto one = train_residual(x, {}, small(3, 16, beam, 1), Rng(3)).quantizer;
      set_thread_count(2);
      const auto two = train_residual(x, {}, small(3, 16, beam, 1), Rng(3)).quantizer;
      for (size_t i = 0; i < 3; ++i) REQUIRE(one.books()[i].storage == two.books()[i].storage);
      std::vector<uint16_t> a(static_cast<size_t>(rows * 3)), b(a), c(a);
      two.encode(x, b.data());
      set_thread_count(1);
      one.encode(x, a.data());
      set_thread_count(before);
      for (int64_t r = 0; r < rows; ++r) one.encode_rows(x.view().slice_rows(r, 1), c.data() + r * 3, 3, 1);
      CHECK(a == b);
      CHECK(a == c);
    }
  }
}

TEST_CASE("refinement never loses on what it trains on, and helps a residual code", "[residual]") {
  const auto x = gaussian(8192, 16, 9);
  const auto plain = train_residual(x, {}, small(4, 64, 4, 0), Rng(1));
  const auto refined = train_residual(x, {}, small(4, 64, 4, 3), Rng(1));
  const double before = mean_error(plain.quantizer, x), after = mean_error(refined.quantizer, x);
  INFO("before " << before << " after " << after);
  CHECK(after < 0.97 * before);
  CHECK(refined.curve.size() == 7);
  for (size_t i = 1; i < 4; ++i) CHECK(refined.curve[i] < refined.curve[i - 1]);
}

TEST_CASE("codewords that leave their storage type are refused", "[residual]") {
  Matrix<float> book(1, 2, 1e5f);
  CHECK_THROWS_WITH(round_codewords(DType::kF16, book), Catch::Contains("bf16"));
  Matrix<float> same(1, 2, 1e5f);
  CHECK_NOTHROW(round_codewords(DType::kBF16, same));
}
