#include "cache/head_map.h"

#include "support/catch.h"
#include "support/linear_maps.h"

using namespace vqkv;
using namespace vqkv::test;

TEST_CASE("what backends multiply with is the map: forward, folded, in place", "[map]") {
  for (const Named& n : all_kinds())
    for (const auto& [first, count] : {std::pair{0, 16}, {8, 8}}) {
      CAPTURE(n.name, first, count);
      const HeadMap head(n.map, n.rows, first, count);
      const std::vector<double> whole = dense_of(n.map, n.rows, kChannels);
      const auto cell = [&](int64_t i, int64_t j) {
        return whole[static_cast<size_t>((head.first_row() + i) * kChannels + first + j)];
      };
      const int64_t rows = head.rows(), tokens = 5, stride = 16;
      const std::vector<float> y = numbers(static_cast<size_t>(tokens * stride), 40);
      std::vector<float> x(static_cast<size_t>(tokens * stride), 1.0f), folded(x.size());
      head.multiply(y.data(), stride, x.data(), stride, tokens, true);
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t j = 0; j < count; ++j) {
          double want = 1;
          for (int64_t i = 0; i < rows; ++i) want += y[static_cast<size_t>(t * stride + i)] * cell(i, j);
          CHECK(x[static_cast<size_t>(t * stride + j)] == Approx(want).margin(1e-4));
        }
      head.fold(y.data(), stride, folded.data(), stride, tokens);
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t i = 0; i < stride; ++i) {
          double want = 0;
          for (int64_t j = 0; j < count && i < rows; ++j) want += y[static_cast<size_t>(t * stride + j)] * cell(i, j);
          CHECK(folded[static_cast<size_t>(t * stride + i)] == Approx(want).margin(1e-4));
        }
      if (!head.turns()) continue;
      for (const bool transposed : {false, true}) {
        std::vector<float> z(static_cast<size_t>(16 * 16));
        const auto place = [&](int64_t t, int64_t c) -> float& {
          return z[static_cast<size_t>(transposed ? c * 16 + t : t * 16 + c)];
        };
        for (int64_t t = 0; t < tokens; ++t)
          for (int64_t c = 0; c < count; ++c) place(t, c) = y[static_cast<size_t>(t * stride + c)];
        head.turn(z.data(), 16, tokens, transposed);
        for (int64_t t = 0; t < tokens; ++t)
          for (int64_t c = 0; c < count; ++c)
            CHECK(place(t, c) == Approx(x[static_cast<size_t>(t * stride + c)] - 1.0f).margin(1e-4));
      }
    }
}
