// Sign sketches and QJL.
#include <cmath>
#include <numbers>

#include "codec/build.h"
#include "codec/codec_set.h"
#include "codec/sign_sketch.h"
#include "codec/vq_support.h"
#include "core/error.h"
#include "core/rng.h"
#include "support/cache_shape.h"
#include "support/catch.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

std::unique_ptr<Codec> make_qjl(const Json& knobs, const UnitShape& unit) {
  REQUIRE(find_method("qjl").check(knobs, unit) == "");
  return find_method("qjl").make(knobs, unit);
}

double dot(const float* a, const float* b, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += double{a[i]} * b[i];
  return sum;
}

}  // namespace

// baseline-methods 4.9
TEST_CASE("the sketch's worked example: four rows, two channels", "[qjl][golden]") {
  const float root = std::numbers::sqrt2_v<float>;
  const SignSketch sketch(2, {root, 0, 0, root, 1, 1, 1, -1});
  const double k[] = {3, 1};
  uint16_t byte = 0;
  sketch.signs(k, 4, &byte);
  CHECK(byte == 0b1111);
  DecodePlan plan;
  plan.channels = plan.code_channels = 2;
  plan.layout.fields = {{"sign", 8, 1, true}};
  plan.layout.sides = {{"norm", DType::kF32, 1, true}};
  SignTerm term = sketch.term(4);
  term.scale_side = 0;
  plan.terms = {term};
  CodeBlock block;
  block.resize(plan.layout, 1);
  block.fields[0] = {byte};
  block.sides[0] = {std::sqrt(10.0f)};
  Matrix<float> x(1, 2);
  decode_plan(plan, block, x);
  const float q[] = {1, 2};
  CHECK(dot(q, x.row(0), 2) == Approx(std::sqrt(std::numbers::pi / 2) / 4 * std::sqrt(10.0) * (2 + 3 * root)));
  CHECK(dot(q, x.row(0), 2) == Approx(6.19).epsilon(1e-3));  // of a true 5
  CountedBooks none;
  CHECK(plan.constant_bytes(none) == 4 * 2 * 4);
}

TEST_CASE("a projection of 0 has a clear bit, the first row the lowest bit", "[qjl][golden]") {
  AlignedVector<float> values(16, 0.0f);  // rows of one channel
  values[1] = values[8] = 1.0f;
  values[2] = -1.0f;
  const SignSketch sketch(1, std::move(values));
  uint16_t bytes[2] = {0xff, 0xff};
  for (const double x : {2.0, 0.0, -2.0}) {
    CAPTURE(x);
    sketch.signs(&x, 16, bytes);
    CHECK(bytes[0] == (x > 0 ? 2 : x < 0 ? 4 : 0));
    CHECK(bytes[1] == (x > 0 ? 1 : 0));
  }
}

TEST_CASE("an orthogonal sketch has orthogonal chunks of length sqrt(d), drawn once", "[qjl]") {
  for (const int width : {1, 24, 64}) {
    const int rows = 5 * width / 2 + 1;
    const auto sketch = sign_sketch(rows, width, true, 3);
    CHECK(sign_sketch(rows, width, true, 3) == sketch);
    if (width > 1) CHECK(*sign_sketch(rows, width, true, 4)->values() != *sketch->values());
    REQUIRE(sketch->rows() == rows);
    double worst = 0;
    for (int i = 0; i < rows; ++i)
      for (int j = i / width * width; j <= i; ++j)
        worst = std::max(
            worst, std::abs(dot(sketch->values()->data() + i * width, sketch->values()->data() + j * width, width) -
                            (i == j ? width : 0)));
    CHECK(worst < 1e-5 * width);
  }
}

// baseline-methods 23: the mean over seeds within 0.01 |q| |k| at d = 128, m = 256, one deviation being
// sqrt(pi / 2 - cos^2) / sqrt(m) where S is Gaussian. An orthogonal S is 1 + 1 / (4 d) times too large.
TEST_CASE("scores are unbiased over seeds", "[qjl][golden]") {
  constexpr int d = 128, m = 256;
  const Matrix<float> qk = gaussian(2, d, 5);
  Matrix<float> k(1, d);
  for (int c = 0; c < d; ++c) k(0, c) = qk(0, c) + 1.5f * qk(1, c);  // neither along q nor across it
  const double size = std::sqrt(dot(qk.row(0), qk.row(0), d) * dot(k.row(0), k.row(0), d));
  const double truth = dot(qk.row(0), k.row(0), d) / size;
  REQUIRE(truth > 0.3);
  for (const bool orthogonal : {false, true}) {
    const int seeds = orthogonal ? 300 : 1000;
    double sum = 0, squares = 0;
    for (int seed = 0; seed < seeds; ++seed) {
      const auto codec =
          make_qjl({{"rows", 2}, {"initial_layers", 0}, {"outliers", 0}, {"orthogonal", orthogonal}, {"seed", seed}},
                   unit_of(d));
      CodeBlock block;
      Matrix<float> x(1, d);
      codec->encode(k, block);
      codec->decode(block, x);
      const double score = dot(qk.row(0), x.row(0), d) / size;
      sum += score;
      squares += score * score;
    }
    const double mean = sum / seeds, deviation = std::sqrt(squares / seeds - mean * mean);
    CAPTURE(orthogonal, mean, truth, deviation);
    CHECK(std::abs(mean - truth * (orthogonal ? 1 + 1 / (4.0 * d) : 1)) < 0.01);
    const double expected = std::sqrt((std::numbers::pi / 2 - truth * truth) / m);
    if (orthogonal)
      CHECK(deviation < expected);
    else
      CHECK(deviation == Approx(expected).epsilon(0.1));
  }
}

// What the sketch of 4.3 gives, computed from its own formula: outlier channels of each group of 32, signs of both
// parts by the same S.
TEST_CASE("a group's loudest channels have signs of their own", "[qjl]") {
  constexpr int d = 16, heads = 2, group = 32, outliers = 3;
  const Json knobs = {{"rows", 4}, {"outlier_rows", 2}, {"initial_layers", 0}, {"outliers", outliers}, {"seed", 9}};
  const auto codec = make_qjl(knobs, unit_of(d, heads));
  Matrix<float> x = gaussian(2 * group, heads * d, 6);
  // Channels 2, 7 and 11 of the first head in the first group; 0, 1 and 15 elsewhere.
  for (int t = 0; t < 2 * group; ++t)
    for (int h = 0; h < heads; ++h)
      for (const int c : t < group && h == 0 ? std::array{11, 2, 7} : std::array{15, 0, 1})
        x(t, h * d + c) += static_cast<float>(10 + c);
  CodeBlock block;
  codec->encode(x, block);
  CHECK(block.fields[1] == std::vector<uint16_t>{2, 7, 11, 0, 1, 15, 0, 1, 15, 0, 1, 15});
  Matrix<float> y(2 * group, heads * d);
  codec->decode(block, y);
  const auto sketch = sign_sketch(4 * d, d, true, 9);
  const auto s = [&](int row, int c) { return double{(*sketch->values())[static_cast<size_t>(row * d + c)]}; };
  double worst = 0;
  for (int t = 0; t < 2 * group; ++t)
    for (int h = 0; h < heads; ++h) {
      const auto apart = [&](int c) {
        return t < group && h == 0 ? c == 2 || c == 7 || c == 11 : c == 0 || c == 1 || c == 15;
      };
      for (const bool outlier : {false, true}) {
        const int rows = outlier ? 2 * d : 4 * d;
        double norm = 0;
        for (int c = 0; c < d; ++c)
          if (apart(c) == outlier) norm += double{x(t, h * d + c)} * x(t, h * d + c);
        std::vector<double> sum(d, 0.0);
        for (int i = 0; i < rows; ++i) {
          double projected = 0;
          for (int c = 0; c < d; ++c)
            if (apart(c) == outlier) projected += s(i, c) * x(t, h * d + c);
          for (int c = 0; c < d; ++c) sum[static_cast<size_t>(c)] += (projected > 0 ? 1 : -1) * s(i, c);
        }
        const double factor = std::sqrt(std::numbers::pi / 2 * norm) / rows;
        for (int c = 0; c < d; ++c)
          if (apart(c) == outlier)
            worst = std::max(worst, std::abs(factor * sum[static_cast<size_t>(c)] - y(t, h * d + c)) / std::sqrt(norm));
      }
    }
  CHECK(worst < 1e-3);  // norms are float16

  // Without rows of their own they decode to 0, and nothing is NaN.
  Json bare = knobs;
  bare["outlier_rows"] = 0;
  const auto without = make_qjl(bare, unit_of(d, heads));
  CHECK(without->layout().sides.size() == 1);
  without->encode(x, block);
  Matrix<float> z(2 * group, heads * d);
  without->decode(block, z);
  for (int t = 0; t < 2 * group; ++t)
    for (int h = 0; h < heads; ++h)
      for (int c = 0; c < d; ++c) {
        const bool apart = t < group && h == 0 ? c == 2 || c == 7 || c == 11 : c == 0 || c == 1 || c == 15;
        REQUIRE(z(t, h * d + c) == (apart ? 0.0f : y(t, h * d + c)));
      }
}

TEST_CASE("the first layers have sketches of their own, and all others share one", "[qjl]") {
  const Json knobs = {{"initial_layers", 2}};
  const auto projection = [&](int layer) {
    return std::get<SignTerm>(make_qjl(knobs, unit_of(64, 1, Role::kKey, layer))->plan().terms.at(0)).projection;
  };
  const auto first = make_qjl(knobs, unit_of(64, 1, Role::kKey, 1)),
             other = make_qjl(knobs, unit_of(64, 1, Role::kKey, 2));
  CHECK(first->layout().fields[0].slots == 4 * 64 / 8);
  CHECK(first->layout().fields[2].slots == 64 / 8);
  CHECK(other->layout().fields[0].slots == 2 * 64 / 8);
  CHECK(other->layout().fields[2].slots == 2 * 64 / 8);
  CHECK(other->constant_bytes() == 128 * 64 * 4);  // both parts read one sketch
  const auto held = other->plan();
  CHECK(projection(7) == std::get<SignTerm>(held.terms.at(0)).projection);
  // As many units as there are: two sketches.
  const auto set_of = [&](int layers) {
    const CacheShape shape = test::make_shape(layers, 4, 2, 64);
    std::vector<TrainedUnit> units;
    for (UnitSpec& spec : resolve_codec({{"name", "qjl"}, {"initial_layers", 2}}, shape).units)
      units.push_back({spec, make_codec(spec), {}});
    return CodecSet(shape, Json::object(), std::move(units), "").constant_bytes();
  };
  CHECK(set_of(2) == 256 * 64 * 4);
  CHECK(set_of(3) == (256 + 128) * 64 * 4);
  CHECK(set_of(5) == (256 + 128) * 64 * 4);
}

TEST_CASE("layers whose sketches differ share none", "[qjl]") {
  struct Nothing final : TrainSource {
    TrainData unit(const UnitShape&, const TrainNeeds&) const override { return {}; }
  };
  const CacheShape shape = test::make_shape(4, 2, 1, 64);
  const auto set = train_codec_set(resolve_codec({{"name", "qjl"}, {"initial_layers", 2}, {"share", "layers"}}, shape),
                                   shape, Nothing(), {});
  const auto codec = [&](int layer) {
    return set->units()[static_cast<size_t>(set->unit_index(layer, 0, Role::kKey))].codec;
  };
  CHECK(codec(0) == codec(1));
  CHECK(codec(2) == codec(3));
  CHECK(codec(1)->layout().fields[0].slots == 4 * 64 / 8);
  CHECK(codec(2)->layout().fields[0].slots == 2 * 64 / 8);
  // Nor is a later layer taken for sound because the first one is.
  CHECK_THAT(resolve_codec({{"name", "qjl"}, {"initial_layers", 2}, {"outlier_rows", 5}}, shape).skip,
             Catch::Contains("layer 2, role k: qjl: signs of outlier channels"));
}

TEST_CASE("sizes that a sketch can't have are refused with the reason", "[qjl]") {
  const auto reason = [](const Json& knobs, int head_dim) {
    return find_method("qjl").check(knobs, unit_of(head_dim));
  };
  CHECK_THAT(reason({{"initial_rows", 1.1}}, 64), Catch::Contains("1.1 times a head of 64"));
  CHECK_THAT(reason({{"initial_outlier_rows", 5}}, 64), Catch::Contains("first rows of the sketch"));
  CHECK(reason({{"initial_outlier_rows", 5}, {"outliers", 0}}, 64) == "");
  CHECK_THAT(reason({{"outliers", 64}}, 64), Catch::Contains("64 outlier channels of a head of 64"));
  CHECK_THAT(reason(Json::object(), 512), Catch::Contains("more than 256"));
  CHECK_THAT(find_method("qjl").check({{"group", 48}}, unit_of(64, 1, Role::kValue)), Catch::Contains("groups of 48"));
}

TEST_CASE("values are KIVI's", "[qjl]") {
  const auto codec = make_qjl(Json::object(), unit_of(64, 1, Role::kValue)),
             kivi = find_method("kivi").make({{"bits", 2}, {"group", 32}}, unit_of(64, 1, Role::kValue));
  const Matrix<float> x = gaussian(7, 64, 8);
  CodeBlock a, b;
  codec->encode(x, a);
  kivi->encode(x, b);
  CHECK(a.fields == b.fields);
  CHECK(a.sides == b.sides);
}
