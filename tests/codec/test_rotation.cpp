#include "codec/train/rotation.h"

#include <cmath>

#include "codec/vq_support.h"
#include "core/gemm.h"
#include "core/thread_pool.h"
#include "support/catch.h"

using namespace vqkv;
using namespace vqkv::test;

TEST_CASE("the opq rotation is orthonormal, deterministic and helps a product code", "[opq]") {
  // Pairs of channels that are almost equal, each pair in different sub-vectors: a rotation can gather their energy.
  auto x = gaussian(3000, 8, 1);
  for (int64_t r = 0; r < x.rows; ++r)
    for (int64_t c = 0; c < 4; ++c) x(r, c + 4) = x(r, c) + 0.05f * x(r, c + 4);
  const int before = thread_count();
  set_thread_count(1);
  const auto a = opq_rotation(x, {2, 5, 65536}, Rng(1));
  set_thread_count(2);
  const auto again = opq_rotation(x, {2, 5, 65536}, Rng(1));
  set_thread_count(before);
  CHECK(a.storage == again.storage);
  for (int64_t i = 0; i < 8; ++i)
    for (int64_t j = 0; j < 8; ++j) {
      double dot = 0;
      for (int64_t k = 0; k < 8; ++k) dot += double{a(i, k)} * a(j, k);
      CHECK(dot == Approx(i == j ? 1.0 : 0.0).margin(1e-4));
    }
  Matrix<float> y(x.rows, 8);
  gemm(x, a, true, y);
  const Json knobs = {{"codebooks", 2}, {"bits", 6}, {"iterations", 10}};
  const double plain = round_trip_mse(*trained("pq", knobs, unit_of(8), x), x);
  const double rotated = round_trip_mse(*trained("pq", knobs, unit_of(8), y), y);
  INFO(plain << " " << rotated);
  CHECK(rotated < 0.9 * plain);
  CHECK_THROWS_AS(opq_rotation(x.view().slice_rows(0, 100), {2, 5, 65536}, Rng(1)), Error);
}
