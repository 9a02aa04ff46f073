// Made-up training data of a unit.
#pragma once
#include "codec/build.h"
#include "core/rng.h"

namespace vqkv::test {

// Rows as real keys are: correlated channels, means, one loud channel a head, a few loud tokens.
inline Matrix<float> rows_of(int64_t n, const UnitShape& unit, uint64_t seed) {
  Rng rng(seed);
  Matrix<float> x(n, unit.channels());
  for (int64_t t = 0; t < n; ++t) {
    double previous = 0;
    const double loud = t % 97 == 5 ? 4.0 : 1.0;
    for (int64_t c = 0; c < x.cols; ++c) {
      previous = 0.5 * previous + rng.normal();
      x(t, c) = static_cast<float>(loud * previous + (c % unit.head_dim == 3 ? 8.0 : 0.1 * static_cast<double>(c % 7)));
    }
  }
  return x;
}

inline TrainData data_of(const UnitShape& unit, int64_t n) {
  TrainData d;
  d.x = rows_of(n, unit, 17);
  d.other_role = rows_of(n, unit, 18);
  d.queries = rows_of(100, unit, 19);
  d.query_moment = Matrix<float>(unit.channels(), unit.channels());
  for (int64_t i = 0; i < d.x.cols; ++i)
    for (int64_t j = 0; j < d.x.cols; ++j) {
      double sum = 0;
      for (int64_t q = 0; q < 100; ++q) sum += double{d.queries(q, i)} * d.queries(q, j);
      d.query_moment(i, j) = i / unit.head_dim == j / unit.head_dim ? static_cast<float>(sum) : 0.0f;
    }
  for (int h = 0; h < unit.heads; ++h)
    for (int p = 0; p < unit.head_dim / 2; ++p) {
      const int a = h * unit.head_dim + p, b = a + unit.head_dim / 2;
      d.query_pair_moment.push_back(d.query_moment(a, a) + d.query_moment(b, b));
    }
  d.output_weight = rows_of(32, unit, 20);
  for (int64_t t = 0; t < n; ++t) {
    d.position.push_back(static_cast<int32_t>(t % 256));
    d.document.push_back(static_cast<int32_t>(t / 256));
    d.received_mass.push_back(0.5f + static_cast<float>(t % 13));
    d.received_mass2.push_back(0.1f + static_cast<float>(t % 5));
  }
  return d;
}

// The same data for every unit.
class MadeUp final : public TrainSource {
 public:
  explicit MadeUp(int64_t tokens) : tokens_(tokens) {}
  TrainData unit(const UnitShape& unit, const TrainNeeds&) const override { return data_of(unit, tokens_); }

 private:
  int64_t tokens_;
};

}  // namespace vqkv::test
