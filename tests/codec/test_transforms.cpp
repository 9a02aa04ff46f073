#include "codec/transform/transform.h"

#include <cmath>

#include "codec/codec_set.h"
#include "codec/transform/symmetric.h"
#include "codec/transform_support.h"
#include "core/error.h"
#include "core/rng.h"
#include "support/catch.h"
#include "support/memory_parameters.h"

using namespace vqkv;
using namespace vqkv::test;

TEST_CASE("every affine transform is undone by its own map and bias", "[transform]") {
  for (const RopePlacement rope : {RopePlacement::kPost, RopePlacement::kPre})
    for (const TransformKind* kind : all_transforms()) {
      const UnitShape unit = unit_of(16, 2, Role::kKey, rope);
      const Data data(unit, 3);
      CAPTURE(kind->describe().name);
      if (!kind->check(kind->canonical(Json::object(), ""), unit).empty()) continue;
      auto t = trained(kind->describe().name, Json::object(), unit, data.set);
      if (t->is_token_scale()) continue;
      if (t->fit_needs().tokens > 0) {
        const int before = t->coded(unit).channels();
        t = t->fit(data.x.view().slice_rows(0, 300), data.queries);
        CHECK(t->coded(unit).channels() == before);
      }
      const int width = t->coded(unit).channels();
      Matrix<float> y(data.x.rows, width), again(data.x.rows, width), back(data.x.rows, 32);
      t->forward(data.x, y);
      LinearMap map;
      std::vector<float> bias;
      t->inverse(map, bias);
      check_map(map, width, 32);
      for (int64_t r = 0; r < back.rows; ++r) {
        const std::vector<float> row = apply(map, {y.row(r), y.row(r) + y.cols}, 32);
        for (size_t c = 0; c < 32; ++c) back(r, static_cast<int64_t>(c)) = row[c] + (bias.empty() ? 0.0f : bias[c]);
      }
      if (width == 32)
        for (size_t i = 0; i < back.storage.size(); ++i)
          REQUIRE(back.storage[i] == Approx(data.x.storage[i]).margin(2e-3));
      // What a narrower code kept, it keeps again.
      t->forward(back, again);
      for (size_t i = 0; i < again.storage.size(); ++i) REQUIRE(again.storage[i] == Approx(y.storage[i]).margin(2e-3));
      // The declared mixing width holds: nothing outside its block.
      if (width != 32) continue;
      const std::vector<double> dense = dense_of(map, 32, 32);
      for (int i = 0; i < 32; ++i)
        for (int j = 0; j < 32; ++j)
          if (i / t->mixed_channels() != j / t->mixed_channels())
            REQUIRE(dense[static_cast<size_t>(i * 32 + j)] == 0.0);
    }
}

TEST_CASE("low_rank keeps what its axes hold, and its axes are counted", "[transform][width]") {
  const UnitShape unit = unit_of(16, 2);
  const Data data(unit, 12);
  std::vector<double> error;
  for (const int rank : {1, 8, 16, 32}) {
    UnitSpec spec;
    spec.unit = unit;
    spec.method = "exact";
    spec.knobs = {{"dtype", "f32"}};
    spec.transforms = Json::array({{{"name", "low_rank"}, {"rank", rank}}});
    const auto codec = make_codec(spec);
    codec->train(data.set, Rng(2));
    CHECK(codec->channels() == 32);
    CHECK(codec->layout().bits_per_token() == 32 * rank);
    CHECK(codec->constant_bytes() == 4 * (32 * rank + 32));
    CodeBlock block;
    codec->encode(data.x, block);
    Matrix<float> y(data.x.rows, 32);
    codec->decode(block, y);
    error.push_back(0);
    for (size_t i = 0; i < y.storage.size(); ++i) error.back() += std::pow(double{y.storage[i]} - data.x.storage[i], 2);
    // Eckart and Young: no other map of this rank about the mean loses less than the trailing eigenvalues.
    const std::vector<double> eigen = symmetric_eigen(covariance(data.x, 0, 32), 32).values;
    double least = 0;
    for (size_t i = static_cast<size_t>(rank); i < 32; ++i) least += eigen[i] * static_cast<double>(data.x.rows);
    CHECK(error.back() == Approx(least).epsilon(1e-3).margin(1e-3));
  }
  CHECK_THAT(find_transform("low_rank").check({{"rank", 33}}, unit), Catch::Contains("33 axes of a unit of 32"));
}

// baseline-methods 7, the toy example: channel 2 goes, though its queries are the largest.
TEST_CASE("prune_channels ranks by the energy of queries times that of keys", "[transform][width][golden]") {
  const auto kept = [](const TrainSet& set, const UnitShape& unit, double ratio) {
    return kept_channels(*trained("prune_channels", {{"ratio", ratio}}, unit, set));
  };
  Matrix<float> q(2, 4), k(3, 4);
  q.storage = {1, .1f, 2, .5f, .5f, .2f, -1, .5f};
  k.storage = {1, 5, .1f, 2, 2, 4, .2f, -1, 0, 6, -.1f, 0};
  const Matrix<float> moment = moment_of(q, 4);
  TrainSet set;
  set.x = k;
  set.query_moment = moment;
  CHECK(kept(set, unit_of(4, 1), 0.25) == std::vector<int>{0, 1, 3});
  CHECK(kept(set, unit_of(4, 1), 0.5) == std::vector<int>{0, 1});
  CHECK(kept(set, unit_of(4, 1), 0.0) == std::vector<int>{0, 1, 2, 3});

  const UnitShape unit = unit_of(16, 2);
  const Data data(unit, 13);
  CHECK(kept(data.set, unit, 0.4) == highest_products(data.queries, data.x, 16, 10));  // floor(0.4 * 16) = 6 a head go
  TrainSet bare = data.set;
  bare.query_moment = {};
  CHECK_THROWS_AS(find_transform("prune_channels").make({{"ratio", 0.4}}, unit)->train(bare, Rng(1)), Error);
}

TEST_CASE("Hadamard is orthonormal and keeps dot products", "[transform][golden]") {
  const UnitShape unit = unit_of(16, 1);
  const auto t = find_transform("hadamard").make({{"signs", true}, {"seed", 4}}, unit);
  const Matrix<float> x = keys(20, 16, 8);
  Matrix<float> y(20, 16);
  t->forward(x, y);
  for (int64_t a = 0; a < 20; ++a) {
    double before = 0, after = 0;
    for (int64_t c = 0; c < 16; ++c) {
      before += double{x(a, c)} * x(0, c);
      after += double{y(a, c)} * y(0, c);
    }
    CHECK(after == Approx(before).epsilon(1e-5));
  }
  // H_4 / 2 of a unit vector
  const auto plain = find_transform("hadamard").make({{"block", 4}}, unit_of(4, 1));
  Matrix<float> e(1, 4), h(1, 4);
  e(0, 1) = 1;
  plain->forward(e, h);
  CHECK(h.storage == AlignedVector<float>{.5f, -.5f, .5f, -.5f});
  CHECK(find_transform("hadamard").check({{"block", 0}}, unit_of(96, 1)) == "");  // blocks of 32
  CHECK_THAT(find_transform("hadamard").check({{"block", 12}}, unit_of(96, 1)), Catch::Contains("power of two"));
  CHECK_THAT(find_transform("hadamard").check({{"block", 64}}, unit_of(96, 1)), Catch::Contains("divide"));
}

TEST_CASE("PCA decorrelates, strongest axis first", "[transform]") {
  const UnitShape unit = unit_of(16, 1);
  const Data data(unit, 5);
  const auto t = trained("rotation", Json::object(), unit, data.set);
  Matrix<float> y(data.x.rows, 16);
  t->forward(data.x, y);
  std::vector<double> mean(16, 0), variance(16, 0);
  for (int64_t r = 0; r < y.rows; ++r)
    for (size_t c = 0; c < 16; ++c) mean[c] += y(r, static_cast<int64_t>(c)) / static_cast<double>(y.rows);
  double cross = 0;
  for (int64_t r = 0; r < y.rows; ++r) {
    for (size_t c = 0; c < 16; ++c) variance[c] += std::pow(y(r, static_cast<int64_t>(c)) - mean[c], 2);
    cross += (y(r, 0) - mean[0]) * (y(r, 1) - mean[1]);
  }
  for (size_t c = 1; c < 16; ++c) CHECK(variance[c] <= variance[c - 1] * 1.0001);
  CHECK(std::abs(cross) < 1e-3 * variance[1]);
}

TEST_CASE("OPQ is a rotation that a product code gains from", "[transform][opq]") {
  const UnitShape unit = unit_of(16, 2);
  const Data data(unit, 6);
  const auto t = trained("rotation", {{"kind", "opq"}, {"groups", 4}, {"iterations", 8}}, unit, data.set);
  LinearMap map;
  std::vector<float> bias;
  t->inverse(map, bias);
  const std::vector<double> dense = dense_of(map, 32, 32);
  for (size_t i = 0; i < 32; ++i)
    for (size_t j = 0; j < 32; ++j) {
      double dot = 0;
      for (size_t l = 0; l < 32; ++l) dot += dense[i * 32 + l] * dense[j * 32 + l];
      REQUIRE(dot == Approx(i == j ? 1.0 : 0.0).margin(1e-4));
    }
  double error[2];
  for (const bool rotated : {false, true}) {
    UnitSpec spec;
    spec.unit = unit_of(16, 1);
    spec.method = "pq";
    spec.knobs = find_method("pq").canonical({{"codebooks", 4}, {"bits", 4}}, "codec");
    spec.transforms = Json::array();
    if (rotated) spec.transforms.push_back({{"name", "rotation"}, {"kind", "opq"}, {"groups", 4}, {"iterations", 8}});
    REQUIRE(spec.check() == "");
    // Channels that go together lie in different sub-vectors: only a rotation brings them into one.
    Rng rng(7);
    Matrix<float> x(4000, 16), y(4000, 16);
    for (int64_t r = 0; r < 4000; ++r)
      for (int64_t c = 0; c < 16; ++c)
        x(r, c) = static_cast<float>(c < 4 ? 2 * rng.normal() : x(r, c - 4) + 0.3 * rng.normal());
    TrainSet set;
    set.x = x;
    set.head_dim = 16;
    const auto codec = make_codec(spec);
    codec->train(set, Rng(3));
    CodeBlock block;
    codec->encode(x, block);
    codec->decode(block, y);
    error[rotated] = 0;
    for (size_t i = 0; i < y.storage.size(); ++i) error[rotated] += std::pow(double{y.storage[i]} - x.storage[i], 2);
  }
  CHECK(error[1] < 0.9 * error[0]);
  CHECK_THAT(find_transform("rotation").check({{"kind", "opq"}, {"groups", 5}}, unit),
             Catch::Contains("5 sub-vectors"));
}

// vq-methods r.9.8
TEST_CASE("squared error in the query metric is the expected squared score error", "[transform][golden]") {
  const UnitShape unit = unit_of(16, 2);
  const Data data(unit, 9);
  for (const bool axes : {true, false}) {
    const auto t = trained("query_metric", {{"ridge", 0.0}, {"axes", axes}}, unit, data.set);
    double trace = 0;
    for (int64_t c = 0; c < 32; ++c) trace += data.moment(c, c);
    const Matrix<float> errors = keys(10, 32, 77);
    Matrix<float> moved(10, 32);
    t->forward(errors, moved);  // linear: no bias
    for (int64_t r = 0; r < 10; ++r)
      for (int h = 0; h < 2; ++h) {
        double score = 0, norm = 0;
        for (int64_t q = 0; q < data.queries.rows; ++q) {
          double dot = 0;
          for (int64_t c = h * 16; c < (h + 1) * 16; ++c) dot += double{data.queries(q, c)} * errors(r, c);
          score += dot * dot;
        }
        for (int64_t c = h * 16; c < (h + 1) * 16; ++c) norm += double{moved(r, c)} * moved(r, c);
        CHECK(norm == Approx(score * 32 / trace).epsilon(1e-3));
      }
  }
}

TEST_CASE("before RoPE the query metric is a weight a pair", "[transform]") {
  const UnitShape unit = unit_of(16, 1, Role::kKey, RopePlacement::kPre);
  const Data data(unit, 10);
  const auto t = trained("query_metric", Json::object(), unit, data.set);
  CHECK(t->commutes_with_rope());
  LinearMap map;
  std::vector<float> bias;
  t->inverse(map, bias);
  const std::vector<float>& factor = std::get<DiagonalMap>(map).factor;
  REQUIRE(factor.size() == 16);
  for (size_t p = 0; p < 8; ++p) {
    CHECK(factor[p] == factor[p + 8]);
    CHECK(factor[0] / factor[p] == Approx(std::sqrt(data.pairs[p] / data.pairs[0])).epsilon(1e-4));
  }
}

TEST_CASE("before a partial RoPE the query metric weighs the pairs that rotate, and a chain hands them on",
          "[transform]") {
  UnitShape unit = unit_of(16, 2, Role::kKey, RopePlacement::kPre);
  unit.rope_facts = RopeFacts::plain(16, 8, 10000);
  Data data(unit, 10);
  for (size_t p = 0; p < 16; ++p) data.pairs[p] = static_cast<float>(1 + p * p);  // as a trace counts them
  data.set.query_pair_moment = data.pairs;
  const auto t = trained("query_metric", Json::object(), unit, data.set);
  LinearMap map;
  std::vector<float> bias;
  t->inverse(map, bias);
  const std::vector<float>& factor = std::get<DiagonalMap>(map).factor;
  REQUIRE(factor.size() == 32);
  for (int p = 0; p < 16; ++p) {
    const auto [a, b] = unit.pair(p);
    CHECK(factor[static_cast<size_t>(a)] == factor[static_cast<size_t>(b)]);
    CHECK(factor[0] / factor[static_cast<size_t>(a)] ==
          Approx(std::sqrt(data.pairs[static_cast<size_t>(p)] / data.pairs[0])).epsilon(1e-4));
  }

  // Behind a scale a channel the metric of a pair is the mean of its two channels'.
  const auto diagonal = [&](const std::vector<const char*>& names) {
    UnitSpec spec;
    spec.unit = unit;
    spec.method = "exact";
    spec.knobs = {{"dtype", "f32"}};
    spec.transforms = Json::array();
    for (const char* name : names) spec.transforms.push_back({{"name", name}});
    const auto codec = make_codec(spec);
    codec->train(data.set, Rng(2));
    return std::get<DiagonalMap>(codec->plan().map).factor;
  };
  const auto scale = diagonal({"channel_scale"}), both = diagonal({"channel_scale", "query_metric"});
  const auto weight = [&](int p) {
    const auto [a, b] = unit.pair(p);
    const double x = scale[static_cast<size_t>(a)], y = scale[static_cast<size_t>(b)];
    return data.pairs[static_cast<size_t>(p)] * (x * x + y * y);
  };
  for (int p = 0; p < 16; ++p)
    for (const int c : {unit.pair(p).first, unit.pair(p).second}) {
      const double own = both[static_cast<size_t>(c)] / scale[static_cast<size_t>(c)], first = both[0] / scale[0];
      CHECK(first / own == Approx(std::sqrt(weight(p) / weight(0))).epsilon(1e-3));
    }
}

TEST_CASE("a metric without moments is refused, not guessed", "[transform]") {
  for (const RopePlacement rope : {RopePlacement::kPost, RopePlacement::kPre}) {
    const UnitShape unit = unit_of(16, 1, Role::kKey, rope);
    const Data data(unit, 11);
    TrainSet bare = data.set;
    bare.query_moment = {};
    bare.query_pair_moment = {};
    const auto t = find_transform("query_metric").make(Json::object(), unit);
    CHECK_THROWS_AS(t->train(bare, Rng(1)), Error);
  }
}

TEST_CASE("corrupted parameters of a transform are refused", "[transform]") {
  for (const RopePlacement rope : {RopePlacement::kPost, RopePlacement::kPre})
    for (const TransformKind* kind : all_transforms()) {
      const UnitShape unit = unit_of(16, 2, Role::kKey, rope);
      const Data data(unit, 81);
      if (!kind->check(kind->canonical(Json::object(), ""), unit).empty()) continue;
      const auto t = trained(kind->describe().name, Json::object(), unit, data.set);
      MemoryParameters saved;
      t->save(saved, "t.");
      CHECK(saved.tensors.empty() == !kind->describe().trained);
      for (const auto& [name, tensor] : saved.tensors) {
        CAPTURE(name);
        MemoryParameters missing = saved, other = saved, poisoned = saved;
        missing.tensors.erase(name);
        other.tensors.at(name).shape.back() -= 1;
        poisoned.tensors.at(name).data[1] = std::nanf("");
        for (const MemoryParameters& bad : {missing, other, poisoned})
          CHECK_THROWS_AS(kind->make(kind->canonical(Json::object(), "t"), unit)->load(bad, "t."), Error);
      }
    }
}
