// Rows, moments and trained transforms for the tests of transforms and of their chains.
#pragma once
#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "codec/transform/transform.h"
#include "core/rng.h"
#include "support/catch.h"
#include "support/codec_rows.h"

namespace vqkv::test {

inline UnitShape unit_of(int head_dim, int heads, Role role, RopePlacement rope) {
  UnitShape unit = unit_of(head_dim, heads, role);
  unit.rope = rope;
  return unit;
}

// Correlated channels with means and an outlier channel, as keys have them.
inline Matrix<float> keys(int64_t rows, int64_t cols, uint64_t seed) {
  Rng rng(seed);
  Matrix<float> x(rows, cols);
  for (int64_t r = 0; r < rows; ++r) {
    double previous = 0;
    for (int64_t c = 0; c < cols; ++c) {
      previous = 0.6 * previous + rng.normal() * (1.0 + 0.1 * static_cast<double>(c));
      x(r, c) = static_cast<float>(previous + (c == 3 ? 6.0 : 0.2 * static_cast<double>(c)));
    }
  }
  return x;
}

// (channels, channels) second moment of `queries`, one block a head.
inline Matrix<float> moment_of(const Matrix<float>& queries, int head_dim) {
  Matrix<float> m(queries.cols, queries.cols);
  for (int64_t i = 0; i < m.rows; ++i)
    for (int64_t j = 0; j < m.cols; ++j) {
      double sum = 0;
      for (int64_t r = 0; r < queries.rows; ++r) sum += double{queries(r, i)} * queries(r, j);
      m(i, j) = i / head_dim == j / head_dim ? static_cast<float>(sum) : 0.0f;
    }
  return m;
}

struct Data {
  Matrix<float> x, queries, moment;
  std::vector<float> pairs;
  TrainSet set;
  Data(const UnitShape& unit, uint64_t seed)
      : x(keys(600, unit.channels(), seed)),
        queries(keys(300, unit.channels(), seed + 1)),
        moment(moment_of(queries, unit.head_dim)) {
    for (int p = 0; p < unit.channels() / 2; ++p) {
      const auto [a, b] = unit.pair(p);
      pairs.push_back(moment(a, a) + moment(b, b));
    }
    set.x = x;
    set.queries = queries;
    set.query_moment = moment;
    set.query_pair_moment = pairs;
    set.head_dim = unit.head_dim;
    set.heads = unit.heads;
  }
};

inline std::unique_ptr<Transform> trained(const std::string& name, const Json& knobs, const UnitShape& unit,
                                          const TrainSet& set) {
  const TransformKind& kind = find_transform(name);
  REQUIRE(kind.check(knobs, unit) == "");
  auto t = kind.make(kind.canonical(knobs, name), unit);
  t->train(set, Rng(1));
  return t;
}

// Channels of the unit that a transform keeps, rising.
inline std::vector<int> kept_channels(const Transform& t) {
  LinearMap map;
  std::vector<float> bias;
  t.inverse(map, bias);
  std::vector<int> out;
  const GatherMap& g = std::get<GatherMap>(map);
  for (size_t c = 0; c < g.from.size(); ++c)
    if (g.from[c] >= 0) out.push_back(static_cast<int>(c));
  CHECK(stored_bytes(map) == 2 * static_cast<int64_t>(out.size()));
  return out;
}

// Of each head the `count` channels with the largest || Q_c K_c^T ||_F, by brute force; rising.
inline std::vector<int> highest_products(ConstMatrix q, ConstMatrix k, int head_dim, int count) {
  std::vector<int> out;
  for (int h = 0; h < k.cols / head_dim; ++h) {
    std::vector<std::pair<double, int>> score;
    for (int c = h * head_dim; c < (h + 1) * head_dim; ++c) {
      double sum = 0;
      for (int64_t a = 0; a < q.rows; ++a)
        for (int64_t b = 0; b < k.rows; ++b) sum += std::pow(double{q(a, c)} * k(b, c), 2);
      score.emplace_back(-sum, c);
    }
    std::sort(score.begin(), score.end());
    for (int i = 0; i < count; ++i) out.push_back(score[static_cast<size_t>(i)].second);
  }
  std::sort(out.begin(), out.end());
  return out;
}

}  // namespace vqkv::test
