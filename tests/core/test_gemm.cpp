#include "core/gemm.h"

#include <cstring>

#include "core/cpu.h"
#include "core/rng.h"
#include "core/thread_pool.h"
#include "support/catch.h"

using namespace vqkv;

namespace {

Matrix<float> random_matrix(int64_t rows, int64_t cols, uint64_t key) {
  Matrix<float> m(rows, cols);
  Rng rng(key);
  for (float& v : m.storage) v = static_cast<float>(rng.normal());
  return m;
}

// Largest |c - exact| over the bound k * 2^-23 * sum |a||b| of a sum in any order.
double worst_ratio(ConstMatrix a, ConstMatrix b_rows, ConstMatrix c, ConstMatrix before, double input_rounding) {
  double worst = 0;
  for (int64_t i = 0; i < c.rows; ++i)
    for (int64_t j = 0; j < c.cols; ++j) {
      double sum = before.data ? before(i, j) : 0, magnitude = std::abs(sum);
      for (int64_t k = 0; k < a.cols; ++k) {
        const double t = static_cast<double>(a(i, k)) * b_rows(j, k);
        sum += t;
        magnitude += std::abs(t);
      }
      const double bound = magnitude * (static_cast<double>(a.cols + 1) * 0x1p-24 + input_rounding) + 1e-30;
      worst = std::max(worst, std::abs(c(i, j) - sum) / bound);
    }
  return worst;
}

bool same_bits(const Matrix<float>& a, const Matrix<float>& b) {
  return a.storage.size() == b.storage.size() && std::memcmp(a.data(), b.data(), a.storage.size() * sizeof(float)) == 0;
}

struct ThreadCount {
  int before = thread_count();
  ~ThreadCount() { set_thread_count(before); }
};

}  // namespace

TEST_CASE("gemm: agrees with a double sum, strided, transposed or not, accumulating or not", "[gemm]") {
  for (const auto& [m, n, k] :
       {std::array<int64_t, 3>{1, 1, 1}, {3, 5, 7}, {70, 65, 33}, {300, 40, 128}, {2, 1500, 64}}) {
    const auto a = random_matrix(m, k + 3, 1), bt = random_matrix(n, k + 5, 2), start = random_matrix(m, n + 2, 3);
    Matrix<float> b(k, n);
    for (int64_t i = 0; i < k; ++i)
      for (int64_t j = 0; j < n; ++j) b(i, j) = bt(j, i);
    const ConstMatrix av = a.view().slice_cols(0, k), bv = bt.view().slice_cols(0, k),
                      sv = start.view().slice_cols(0, n);
    for (const bool accumulate : {false, true}) {
      CAPTURE(m, n, k, accumulate);
      Matrix<float> c = start, d = start;
      gemm(av, bv, true, c.view().slice_cols(0, n), accumulate);
      gemm(av, b, false, d.view().slice_cols(0, n), accumulate);
      CHECK(worst_ratio(av, bv, c.view().slice_cols(0, n), accumulate ? sv : ConstMatrix(), 0) <= 1);
      CHECK(worst_ratio(av, bv, d.view().slice_cols(0, n), accumulate ? sv : ConstMatrix(), 0) <= 1);
      for (int64_t i = 0; i < m; ++i) CHECK(c(i, n) == start(i, n));  // the gap between rows stays as it was
    }
  }
}

TEST_CASE("packed weights: agree with a double sum for one row and for blocks, f32 and bf16", "[gemm]") {
  for (const auto& [n, k] : {std::array<int64_t, 2>{1, 1}, {63, 17}, {64, 64}, {130, 100}, {1088, 33}}) {
    const auto w = random_matrix(n, k, 4);
    for (const DType storage : {DType::kF32, DType::kBF16}) {
      const PackedWeights packed(w, storage);
      // Half a unit in the last of 8 bits, of weights and perhaps of inputs.
      const double rounding = storage == DType::kF32 ? 0 : packed.rounds_inputs() ? 0x1p-7 : 0x1p-8;
      CHECK(packed.out_features() == n);
      CHECK(packed.in_features() == k);
      std::vector<float> row(static_cast<size_t>(k));
      for (int64_t r = 0; r < n; ++r) {
        packed.copy_row(r, row.data());
        for (int64_t i = 0; i < k; ++i)
          REQUIRE(row[static_cast<size_t>(i)] == (storage == DType::kF32 ? w(r, i) : round_to_bf16(w(r, i))));
      }
      for (const int64_t m : {1, 2, 15, 64, 67})
        for (const bool accumulate : {false, true}) {
          CAPTURE(n, k, m, accumulate, dtype_name(storage));
          const auto x = random_matrix(m, k + 1, 5), start = random_matrix(m, n, 6);
          Matrix<float> y = start;
          const ConstMatrix xv = x.view().slice_cols(0, k);
          packed.apply(xv, y, accumulate);
          CHECK(worst_ratio(xv, w, y, accumulate ? start.view() : ConstMatrix(), rounding) <= 1);
        }
    }
  }
}

TEST_CASE("packed weights: bf16 loses what rounding loses, and nothing in products or sums", "[gemm]") {
  for (const auto& [n, k] : {std::array<int64_t, 2>{1, 1}, {64, 64}, {65, 33}, {130, 1537}}) {
    const auto w = random_matrix(n, k, 9);
    const PackedWeights packed(w, DType::kBF16);
    CHECK(packed.rounds_inputs() == cpu_features().bf16_products);
    Matrix<float> w_rounded = w;
    for (float& v : w_rounded.storage) v = round_to_bf16(v);
    for (const int64_t m : {1, 6, 13}) {
      CAPTURE(n, k, m);
      const auto x = random_matrix(m, k, 10);
      Matrix<float> x_seen = x, y(m, n);
      if (packed.rounds_inputs())
        for (float& v : x_seen.storage) v = round_to_bf16(v);
      packed.apply(x, y);
      CHECK(worst_ratio(x_seen, w_rounded, y, ConstMatrix(), 0) <= 1);
    }
  }
  CHECK_FALSE(PackedWeights(random_matrix(3, 3, 1), DType::kF32).rounds_inputs());
}

TEST_CASE("packed weights in 4 bits: half a step from the weights, and products of what they widen to", "[gemm]") {
  for (const auto& [n, k] : {std::array<int64_t, 2>{1, 1}, {63, 17}, {64, 64}, {130, 101}})
    for (const int group : {1, 16, 128}) {
      const auto w = random_matrix(n, k, 4);
      const PackedWeights whole(w, DType::kF32), packed = whole.quantized(group);
      CHECK(packed.out_features() == n);
      CHECK(packed.in_features() == k);
      CHECK_FALSE(packed.rounds_inputs());
      const int64_t panels = (n + 63) / 64;
      CHECK(packed.bytes() == panels * 64 * (2 * ((k + group - 1) / group) + (k + 1) / 2));
      CHECK(whole.bytes() == panels * 64 * k * 4);
      Matrix<float> wide(n, k);
      for (int64_t r = 0; r < n; ++r) {
        packed.copy_row(r, wide.row(r));
        for (int64_t first = 0; first < k; first += group) {
          const int64_t end = std::min<int64_t>(k, first + group);
          float most = 0;
          for (int64_t i = first; i < end; ++i) most = std::max(most, std::abs(w(r, i)));
          // The largest is half a step beyond the last code above; scales are float16.
          for (int64_t i = first; i < end; ++i)
            REQUIRE(std::abs(wide(r, i) - w(r, i)) <= most * (1.0f / 15 + 0x1p-10f));
        }
      }
      for (const int64_t m : {1, 7}) {
        CAPTURE(n, k, group, m);
        const auto x = random_matrix(m, k, 5), y_back = random_matrix(m, n, 6);
        Matrix<float> y(m, n), of_wide(m, n), back(m, k), back_wide(m, k);
        packed.apply(x, y);
        PackedWeights(wide, DType::kF32).apply(x, of_wide);
        CHECK(y.storage == of_wide.storage);
        packed.apply_transposed(y_back, back);
        PackedWeights(wide, DType::kF32).apply_transposed(y_back, back_wide);
        CHECK(back.storage == back_wide.storage);
      }
    }
}

TEST_CASE("packed weights: matrices stacked equal matrices apart", "[gemm]") {
  const auto a = random_matrix(70, 48, 1), b = random_matrix(10, 48, 2), x = random_matrix(20, 48, 3);
  const ConstMatrix both[] = {a, b};
  Matrix<float> y(20, 80), ya(20, 70), yb(20, 10);
  PackedWeights(both, DType::kF32).apply(x, y);
  PackedWeights(a, DType::kF32).apply(x, ya);
  PackedWeights(b, DType::kF32).apply(x, yb);
  for (int64_t i = 0; i < 20; ++i) {
    for (int64_t j = 0; j < 70; ++j) REQUIRE(y(i, j) == ya(i, j));
    for (int64_t j = 0; j < 10; ++j) REQUIRE(y(i, 70 + j) == yb(i, j));
  }
}

TEST_CASE("products: the same bits with 1, 2 and 3 threads, and inside parallel_for", "[gemm]") {
  const ThreadCount restore;
  // SmolLM2's shapes, and rows as wide as Qwen2.5-0.5B's (896 -> 9728, 4864 -> 896).
  const std::array<int64_t, 2> shapes[] = {{960, 576}, {3072, 576}, {576, 1536}, {9728, 896}, {896, 4864}, {77, 4865}};
  for (const auto& [n, k] : shapes) {
    const auto w = random_matrix(n, k, 7);
    const PackedWeights f32(w, DType::kF32), narrow(w, DType::kBF16);
    for (const int64_t m : {1, 2, 3, 16, 33, 100, 129, 512}) {
      if (m == 512 && n * k > 3'000'000) continue;  // seconds, and cut like 129
      CAPTURE(n, k, m);
      const auto x = random_matrix(m, k, 8);
      Matrix<float> first[3], again[3];
      const auto products = [&](Matrix<float>* y) {
        for (int i = 0; i < 3; ++i) y[i] = Matrix<float>(m, n);
        f32.apply(x, y[0]);
        narrow.apply(x, y[1]);
        if (m <= 129) gemm(x, w, true, y[2]);
      };
      set_thread_count(1);
      products(first);
      for (const int threads : {2, 3}) {
        set_thread_count(threads);
        products(again);
        for (int i = 0; i < 3; ++i) REQUIRE(same_bits(first[i], again[i]));
      }
      parallel_for(2, [&](int64_t i) {
        if (i == 1) products(again);
      });
      for (int i = 0; i < 3; ++i) REQUIRE(same_bits(first[i], again[i]));
      // A row alone has the bits that it has in the block.
      for (const int64_t r : {int64_t{0}, m / 2, m - 1}) {
        for (int i = 0; i < 2; ++i) {
          Matrix<float> alone(1, n);
          (i == 0 ? f32 : narrow).apply(x.view().slice_rows(r, 1), alone);
          REQUIRE(std::memcmp(alone.data(), first[i].row(r), static_cast<size_t>(n) * sizeof(float)) == 0);
        }
      }
    }
  }
}

TEST_CASE("packed weights: the transposed product agrees with a double sum, f32 and bf16, at any thread count",
          "[gemm]") {
  const ThreadCount restore;
  for (const auto& [n, k] : {std::array<int64_t, 2>{1, 1}, {63, 17}, {130, 100}, {1088, 33}, {2100, 40}}) {
    const auto w = random_matrix(n, k, 4), y = random_matrix(70, n + 3, 5), start = random_matrix(70, k + 2, 6);
    const ConstMatrix yv = y.view().slice_cols(2, n);
    for (const DType storage : {DType::kF32, DType::kBF16})
      for (const bool accumulate : {false, true}) {
        CAPTURE(n, k, accumulate);
        const PackedWeights packed(w, storage);
        Matrix<float> columns(k, n);  // of the weights as they are held
        std::vector<float> row(static_cast<size_t>(k));
        for (int64_t r = 0; r < n; ++r) {
          packed.copy_row(r, row.data());
          for (int64_t c = 0; c < k; ++c) columns(c, r) = row[static_cast<size_t>(c)];
        }
        set_thread_count(1);
        Matrix<float> x = start;
        packed.apply_transposed(yv, x.view().slice_cols(0, k), accumulate);
        CHECK(worst_ratio(yv, columns, x.view().slice_cols(0, k),
                          accumulate ? start.view().slice_cols(0, k) : ConstMatrix(), 0) <= 1);
        for (int64_t r = 0; r < 70; ++r) CHECK(x(r, k + 1) == start(r, k + 1));
        set_thread_count(3);
        Matrix<float> again = start;
        packed.apply_transposed(yv, again.view().slice_cols(0, k), accumulate);
        CHECK(same_bits(again, x));
      }
  }
}
