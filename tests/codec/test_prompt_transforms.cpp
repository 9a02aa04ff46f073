// Transforms that are fitted to each prompt: think and deco.
#include <algorithm>
#include <cmath>

#include "codec/codec_set.h"
#include "codec/transform_support.h"
#include "support/catch.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

std::unique_ptr<Transform> made(const std::string& name, const Json& knobs, const UnitShape& unit) {
  const TransformKind& kind = find_transform(name);
  REQUIRE(kind.check(knobs, unit) == "");
  return kind.make(kind.canonical(knobs, name), unit);
}

std::unique_ptr<Codec> behind(const std::string& method, const Json& knobs, const Json& transforms,
                              const UnitShape& unit) {
  UnitSpec spec;
  spec.unit = unit;
  spec.method = method;
  spec.knobs = find_method(method).canonical(knobs, "");
  for (Json t : transforms) {
    const std::string name = t.at("name");
    t.erase("name");
    Json full = find_transform(name).canonical(t, "");
    full["name"] = name;
    spec.transforms.push_back(full);
  }
  return make_codec(spec);
}

double largest_error(const Matrix<float>& y, ConstMatrix x) {
  double worst = 0;
  for (int64_t r = 0; r < x.rows; ++r)
    for (int64_t c = 0; c < x.cols; ++c) worst = std::max(worst, std::abs(double{y(r, c)} - x(r, c)));
  return worst;
}

}  // namespace

// baseline-methods 7.9: channel 2 goes, though its queries are the largest.
TEST_CASE("think drops what the newest queries of a prompt look at least", "[transform][golden]") {
  Matrix<float> q(2, 4), k(3, 4);
  q.storage = {1, .1f, 2, .5f, .5f, .2f, -1, .5f};
  k.storage = {1, 5, .1f, 2, 2, 4, .2f, -1, 0, 6, -.1f, 0};
  const double expected[] = {1.0417, .6417, .0500, .4167};
  for (int c = 0; c < 4; ++c) {
    double of_q = 0, of_k = 0;
    for (int r = 0; r < 2; ++r) of_q += q(r, c) * q(r, c) / 2.0;
    for (int r = 0; r < 3; ++r) of_k += k(r, c) * k(r, c) / 3.0;
    CHECK(of_q * of_k == Approx(expected[c]).margin(1e-4));
  }
  // Three tokens, of which two are asked: what the first asked for counts for nothing.
  Matrix<float> all(3, 4, 100.0f);
  all(0, 2) = 1e6f;
  std::copy_n(q.data(), 8, all.row(1));
  const auto kept = [&](double ratio) {
    return kept_channels(*made("think", {{"ratio", ratio}, {"queries", 2}}, unit_of(4, 1))->fit(k, all));
  };
  CHECK(kept(0.25) == std::vector<int>{0, 1, 3});
  CHECK(kept(0.5) == std::vector<int>{0, 1});
  CHECK(kept(0) == std::vector<int>{0, 1, 2, 3});

  // || Q_c K_c^T ||_F by brute force, for 3 query heads a KV head, in each of two heads.
  const UnitShape unit = unit_of(16, 2);
  const Data data(unit, 13);
  const Matrix<float> queries = keys(600, 32, 14);
  const ConstMatrix prompt = data.x.view().slice_rows(0, 200);
  const auto fitted = made("think", {{"ratio", 0.4}}, unit)->fit(prompt, queries);
  CHECK(kept_channels(*fitted) == highest_products(queries.view().slice_rows(600 - 96, 96), prompt, 16, 10));
  CHECK(fitted->fitted_bytes() == 4);  // a bit a channel
  CHECK_THAT(find_transform("think").check(Json::object(), unit_of(16, 1, Role::kValue)), Catch::Contains("codec.k"));
  CHECK_THAT(find_transform("think").check(Json::object(), unit_of(16, 1, Role::kKey, RopePlacement::kPre)),
             Catch::Contains("after RoPE"));
}

TEST_CASE("think before a codec: kept channels as without it, the others 0, by each prompt's own mask",
          "[transform][golden]") {
  const UnitShape unit = unit_of(16, 2);
  const Data data(unit, 23), other(unit, 29);
  const ConstMatrix prompt = data.x.view().slice_rows(0, 300), later = data.x.view().slice_rows(320, 64);
  Matrix<float> weighed = other.queries;  // another prompt looks elsewhere
  for (int64_t r = 0; r < weighed.rows; ++r)
    for (int64_t c = 0; c < weighed.cols; ++c) weighed(r, c) *= c % 16 < 8 ? 0.1f : 1.0f;
  for (const bool kivi : {false, true}) {
    const Json knobs = kivi ? Json{{"bits", 2}, {"group", 32}} : Json{{"dtype", "f32"}};
    const std::string method = kivi ? "kivi" : "exact";
    CAPTURE(method);
    const auto plain = behind(method, knobs, Json::array(), unit);
    const auto codec = behind(method, knobs, {{{"name", "think"}}}, unit);
    CHECK(codec->fit_needs().tokens == 32);
    CHECK(codec->fit_needs().queries);
    CHECK(codec->constant_bytes() == 0);  // the mask is each prompt's
    CHECK(codec->layout().bits_per_token() == plain->layout().bits_per_token() * 10 / 16);
    const auto state = codec->fit(prompt, {}, data.queries), second = codec->fit(prompt, {}, weighed);
    REQUIRE(state);
    CHECK(state->bytes() == 4);
    const std::vector<int> kept = highest_products(data.queries.view().slice_rows(268, 32), prompt, 16, 10);
    // KIVI's groups are of one channel: pruning before it leaves the codes of the others as they were.
    const Matrix<float> y = through(*codec, later, state.get()), whole = through(*plain, later, nullptr);
    for (int64_t r = 0; r < y.rows; ++r)
      for (int64_t c = 0; c < y.cols; ++c) REQUIRE(y(r, c) == (std::ranges::count(kept, c) > 0 ? whole(r, c) : 0.0f));
    CHECK_FALSE(through(*codec, later, second.get()).storage == y.storage);
    CHECK(through(*codec, later, state.get()).storage == y.storage);
    // At ratio 0 it is the identity.
    const auto all = behind(method, knobs, {{{"name", "think"}, {"ratio", 0}}}, unit);
    CHECK(through(*all, later, all->fit(prompt, {}, data.queries).get()).storage == whole.storage);
  }
}

TEST_CASE("what is fitted in a chain is fitted behind what stands before it", "[transform][chain]") {
  const UnitShape unit = unit_of(16, 2);
  const Data data(unit, 31);
  const ConstMatrix prompt = data.x.view().slice_rows(0, 300);
  // A scale that makes quiet channels loud in keys makes their queries quiet: the scores are the same.
  const auto codec = behind("exact", {{"dtype", "f32"}},
                            {{{"name", "channel_scale"}}, {{"name", "think"}}, {{"name", "identity"}}}, unit);
  codec->train(data.set, Rng(1));
  const auto state = codec->fit(prompt, {}, data.queries);
  const std::vector<int> kept = highest_products(data.queries.view().slice_rows(268, 32), prompt, 16, 10);
  const Matrix<float> y = through(*codec, prompt, state.get());
  for (int64_t c = 0; c < y.cols; ++c)
    CHECK(y(7, c) == (std::ranges::count(kept, c) > 0 ? Approx(prompt(7, c)).epsilon(1e-5) : Approx(0.0)));
  // Scales are constants of the model, the mask of the prompt.
  CHECK(codec->constant_bytes() ==
        behind("exact", Json::object(), {{{"name", "channel_scale"}}}, unit)->constant_bytes());
  CHECK(state->bytes() == 4);
}

TEST_CASE("deco: the factors of a prompt are its own before anything is coded", "[transform][golden]") {
  const UnitShape unit = unit_of(64, 2, Role::kValue);
  const Data data(unit, 41);
  const auto t = made("deco", Json::object(), unit);
  const ConstMatrix prompt = data.x.view().slice_rows(0, 200);
  const auto fitted = t->fit(prompt, {});
  CHECK(fitted->fitted_bytes() == 512);  // 16 x 16 in f16
  LinearMap map;
  std::vector<float> bias;
  fitted->inverse(map, bias);
  CHECK(bias.empty());
  const auto& blocks = std::get<BlockMap>(map).blocks;
  REQUIRE(blocks.size() == 8);
  for (const auto& block : blocks) {
    CHECK(block.values == blocks[0].values);
    for (const float v : block.values) CHECK(round_side(DType::kF16, v) == v);
  }
  // With X = U L V^T of runs below each other, A = U L^(1/2) and B = L^(1/2) V^T: A B = X, A^T A = B B^T = L, and
  // B^T B = V L V^T squares to X^T X.
  Matrix<float> a(200, 128), x(1600, 16), factor(1600, 16), b(16, 16);
  fitted->forward(prompt, a);
  for (int64_t r = 0; r < 200; ++r)
    for (int64_t c = 0; c < 128; ++c) {
      x(r * 8 + c / 16, c % 16) = prompt(r, c);
      factor(r * 8 + c / 16, c % 16) = a(r, c);
    }
  std::copy_n(blocks[0].values.data(), 256, b.data());
  using Square = std::vector<double>;  // (16, 16)
  const auto gram = [](ConstMatrix m) {
    Square out(256, 0.0);
    for (int64_t r = 0; r < m.rows; ++r)
      for (int64_t i = 0; i < 16; ++i)
        for (int64_t j = 0; j < 16; ++j) out[static_cast<size_t>(16 * i + j)] += double{m(r, i)} * m(r, j);
    return out;
  };
  const auto near = [](const Square& one, const Square& other) {
    double apart = 0, all = 0;
    for (size_t i = 0; i < 256; ++i) {
      apart += std::pow(one[i] - other[i], 2);
      all += other[i] * other[i];
    }
    return std::sqrt(apart / all);
  };
  Square outer(256, 0.0), squared(256, 0.0), diagonal(256, 0.0);
  const Square inner = gram(b);
  for (size_t i = 0; i < 16; ++i)
    for (size_t j = 0; j < 16; ++j)
      for (size_t l = 0; l < 16; ++l) {
        outer[16 * i + j] += double{b.storage[16 * i + l]} * b.storage[16 * j + l];
        squared[16 * i + j] += inner[16 * i + l] * inner[16 * l + j];
      }
  for (size_t i = 0; i < 256; i += 17) diagonal[i] = outer[i];
  CHECK(near(gram(factor), outer) < 2e-3);
  CHECK(near(outer, diagonal) < 2e-3);
  CHECK(near(squared, gram(x)) < 2e-3);
  for (int64_t r = 0; r < 1600; ++r) {
    const std::vector<float> row = apply(DenseMap{16, 16, blocks[0].values}, {factor.row(r), factor.row(r) + 16}, 16);
    for (int64_t c = 0; c < 16; ++c) REQUIRE(row[static_cast<size_t>(c)] == Approx(x(r, c)).epsilon(1e-4).margin(1e-4));
  }

  // At 16 bits nothing is lost that a float holds, of the prompt and of what follows.
  const auto codec = behind("rtn", {{"bits", 16}, {"mode", "symmetric"}, {"group", -1}, {"scale_type", "f32"}},
                            {{{"name", "deco"}}}, unit);
  const auto state = codec->fit({}, prompt, {});
  CHECK(state->bytes() == 512);
  CHECK(codec->constant_bytes() == 0);
  CHECK(largest_error(through(*codec, data.x, state.get()), data.x) < 0.01);
  CHECK_THAT(find_transform("deco").check({{"run", 16}}, unit_of(24, 1)), Catch::Contains("16 channels don't divide"));
}

TEST_CASE("deco keeps prompts of few directions, of one and of none", "[transform]") {
  const UnitShape unit = unit_of(32, 1);
  const auto t = made("deco", Json::object(), unit);
  for (const float loud : {0.0f, 1e-12f, 1.0f, 1e6f})
    for (const int rank : {1, 3}) {
      CAPTURE(loud, rank);
      Matrix<float> x(40, 32);
      for (int64_t r = 0; r < 40; ++r)
        for (int64_t c = 0; c < 32; ++c)
          x(r, c) = loud * std::sin(static_cast<float>((r + c / 16) % rank + 1) * static_cast<float>(c % 16 + 1));
      const auto fitted = t->fit(x, {});
      Matrix<float> a(40, 32), y(40, 32);
      fitted->forward(x, a);
      LinearMap map;
      std::vector<float> bias;
      fitted->inverse(map, bias);
      for (int64_t r = 0; r < 40; ++r) {
        const std::vector<float> row = apply(map, {a.row(r), a.row(r) + 32}, 32);
        std::copy_n(row.data(), 32, y.row(r));
      }
      CHECK(largest_error(y, x) <= 1e-3 * loud);
    }
}

// baseline-methods 8.9: a row of A, at 4 bits with one scale for all channels of the token.
TEST_CASE("DecoQuant's codes are symmetric, of the loudest value of a token", "[transform][golden]") {
  const auto codec =
      behind("rtn", {{"bits", 4}, {"mode", "symmetric"}, {"group", -1}}, Json::array(), unit_of(2, 2, Role::kValue));
  Matrix<float> row(1, 4);
  row.storage = {.7f, -2.1f, 1.4f, .2f};
  CodeBlock block;
  codec->encode(row, block);
  CHECK(block.fields[0] == std::vector<uint16_t>{7 + 2, 7 - 7, 7 + 5, 7 + 1});
  CHECK(block.sides[0].size() == 1);
  const Matrix<float> y = through(*codec, row, nullptr);
  for (const auto& [at, expected] : {std::pair{0, .6}, {1, -2.1}, {2, 1.5}, {3, .3}})
    CHECK(y(0, at) == Approx(expected).epsilon(1e-3));
}
