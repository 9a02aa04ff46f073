// KVQuant against its formulas: baseline-methods 3, 18.2 and 23.
#include <algorithm>
#include <cmath>

#include "codec/build.h"
#include "codec/vq_support.h"
#include "core/error.h"
#include "core/thread_pool.h"
#include "support/cache_shape.h"
#include "support/catch.h"
#include "support/memory_parameters.h"

using namespace vqkv;
using namespace vqkv::test;
using Catch::Contains;

namespace {

// A codec with these parameters, untrained.
std::unique_ptr<Codec> with_parameters(const Json& knobs, const UnitShape& unit, const std::vector<float>& levels,
                                       const std::vector<float>& zero, const std::vector<float>& range) {
  MemoryParameters p;
  const float norm[] = {1, 0};
  p.tensor("levels", {static_cast<int64_t>(levels.size())}, levels.data());
  p.tensor("norm", {2}, norm);
  p.tensor("zero", {static_cast<int64_t>(zero.size())}, zero.data());
  p.tensor("range", {static_cast<int64_t>(range.size())}, range.data());
  auto codec = find_method("kvquant").make(knobs, unit);
  codec->load(p);
  return codec;
}

Matrix<float> row(std::vector<float> values) {
  Matrix<float> m(1, static_cast<int64_t>(values.size()));
  std::ranges::copy(values, m.storage.begin());
  return m;
}

}  // namespace

// baseline-methods 3.9: a channel between -1 and 3.
TEST_CASE("KVQuant's worked example: a key channel, its levels and an outlier", "[kvquant][golden]") {
  const std::vector<float> levels = {-.8f, -.25f, .2f, .75f};
  const auto codec = with_parameters({{"bits", 2}}, unit_of(1), levels, {1}, {2});
  Matrix<float> x(8, 1);
  std::ranges::copy(std::vector<float>{-.6f, .4f, 1.5f, 2.9f, 7, 3, -1, -1.25f}, x.storage.begin());
  CodeBlock codes;
  const Matrix<float> y = round_trip(*codec, x, &codes);
  const float expected[] = {-.6f, .5f, 1.4f, 2.5f, 7, 2.5f, -.6f, -1.25f};
  for (size_t i = 0; i < 8; ++i) CHECK(y.storage[i] == Approx(expected[i]).margin(1e-3));  // levels are stored in f16
  CHECK(codes.fields[0] == std::vector<uint16_t>{0, 1, 2, 3, 3, 3, 0, 0});
  REQUIRE(codes.overlay.size() == 2);  // the ends themselves are not outliers
  CHECK((codes.overlay[0].token == 4 && codes.overlay[0].value == 7 && !codes.overlay[0].add));
  CHECK((codes.overlay[1].token == 7 && codes.overlay[1].value == -1.25f));
}

TEST_CASE("KVQuant's values: the outermost of a token are exact, the rest spans its range", "[kvquant][golden]") {
  const auto codec =
      find_method("kvquant").make({{"bits", 2}, {"datatype", "int"}, {"outliers", .25}}, unit_of(8, 1, Role::kValue));
  CodeBlock codes;
  const Matrix<float> y = round_trip(*codec, row({10.1f, .9f, -1, 3, -9, 2, .3f, 0}), &codes);
  // One at each end; -1 to 3 is left: levels -1, 1/3, 5/3, 3.
  REQUIRE(codes.overlay.size() == 2);
  CHECK((codes.overlay[0].channel == 0 && codes.overlay[0].value == round_side(DType::kF16, 10.1f)));
  CHECK((codes.overlay[1].channel == 4 && codes.overlay[1].value == -9));
  CHECK((codes.sides[0] == std::vector<float>{2} && codes.sides[1] == std::vector<float>{1}));
  const float expected[] = {round_side(DType::kF16, 10.1f), 1 / 3.f, -1, 3, -9, 5 / 3.f, 1 / 3.f, 1 / 3.f};
  for (size_t i = 0; i < 8; ++i) CHECK(y.storage[i] == Approx(expected[i]).margin(1e-3));
  // Equal values at an end: as many as the share says, the same ones every time.
  const Matrix<float> ties = round_trip(*codec, row({1, 1, 1, 1, 1, 1, 1, 1}), &codes);
  CHECK(codes.overlay.size() == 2);
  for (const float v : ties.storage) CHECK(v == Approx(1).margin(1e-4));
}

TEST_CASE("KVQuant stores the share of outliers that was asked for", "[kvquant]") {
  const Matrix<float> x = gaussian(4000, 1024, 3);
  const auto keys = trained("kvquant", {{"bits", 2}}, unit_of(128, 8), x);
  CodeBlock codes;
  Matrix<float> y = round_trip(*keys, x, &codes);
  // Beyond the half-percent quantiles of each channel: 20 of 4,000 values at either end, and on fresh rows about that.
  CHECK(static_cast<double>(codes.overlay.size()) == Approx(.01 * 4000 * 1024).epsilon(.03));  // ends are stored in f16
  for (const OverlayEntry& e : codes.overlay) {
    REQUIRE(y(e.token, e.channel) == round_side(DType::kF16, x(e.token, e.channel)));
    REQUIRE(std::abs(x(e.token, e.channel)) > 1.5f);
  }
  round_trip(*keys, gaussian(4000, 1024, 4), &codes);
  CHECK(static_cast<double>(codes.overlay.size()) / (4000 * 1024) == Approx(.01).epsilon(.1));
  // ceil(.005 D) at each end of a token: 6 of 1024, 3 of 512, 1 of 192 and of 64.
  for (const auto& [channels, ends] : {std::pair{1024, 6}, {512, 3}, {192, 1}, {64, 1}, {200, 1}, {201, 2}}) {
    const auto values = find_method("kvquant").make(Json::object(), unit_of(channels, 1, Role::kValue));
    const Matrix<float> v = gaussian(3, channels, 5);
    y = round_trip(*values, v, &codes);
    CHECK(codes.overlay.size() == static_cast<size_t>(3 * 2 * ends));
    for (const OverlayEntry& e : codes.overlay) {
      CHECK(y(e.token, e.channel) == round_side(DType::kF16, v(e.token, e.channel)));
      int beyond = 0;
      for (int c = 0; c < channels; ++c) beyond += std::abs(v(e.token, c)) > std::abs(v(e.token, e.channel));
      CHECK(beyond < 4 * ends);
    }
  }
}

// baseline-methods 23: without outliers it is the plain data type. 1.1 and 1.3 give the errors.
TEST_CASE("KVQuant without outliers is its data type alone", "[kvquant][golden]") {
  const Matrix<float> x = gaussian(8000, 128, 11), channel = gaussian(100000, 1, 11);
  const double lloyd_max[] = {.11748, .03455, .00950}, even[] = {.250, .0456, .0099};
  for (const int bits : {2, 3, 4}) {
    CAPTURE(bits);
    CodeBlock codes;
    const Json nuq = {{"bits", bits}, {"outliers", 0}};
    const auto keys = trained("kvquant", nuq, unit_of(1), channel);
    CHECK(keys->layout().bits_per_token() == bits);
    CHECK(keys->layout().overlay_bits_per_token(0) == 0);
    CHECK(relative_error(round_trip(*keys, channel, &codes), channel) == Approx(lloyd_max[bits - 2]).epsilon(.03));
    CHECK(codes.overlay.empty());
    const Json int_codes = {{"bits", bits}, {"outliers", 0}, {"datatype", "int"}};
    const auto values = trained("kvquant", int_codes, unit_of(128, 1, Role::kValue), x);
    CHECK(relative_error(round_trip(*values, x, &codes), x) == Approx(even[bits - 2]).epsilon(.03));
    CHECK(codes.overlay.empty());
    CHECK(values->layout().bits_per_token() == 128 * bits + 32);
  }
}

// vq-methods r.9 no. 10, numbers of e.3: a query gives keys that became means of what they stand for less mass than it
// gave them, by Jensen's inequality; what the nearest even level does adds noise, and mass.
TEST_CASE("Coded keys lose mass where levels are means, and gain it where they are a grid", "[kvquant][golden]") {
  const Matrix<float> x = gaussian(200000, 1, 13);
  const Matrix<float> means = round_trip(*trained("kvquant", {{"bits", 2}, {"outliers", 0}}, unit_of(1), x), x);
  Matrix<float> grid = x;  // a level at every integer
  for (float& v : grid.storage) v = std::round(v);
  const auto mass = [](const Matrix<float>& keys, double size) {
    double sum = 0;
    for (const float k : keys.storage) sum += std::exp(size * k);
    return std::log(sum / static_cast<double>(keys.rows));
  };
  for (const auto& [size, lost] : {std::pair{0.3, 0.0055}, {0.6, 0.024}, {1.0, 0.082}, {1.5, 0.237}}) {
    CAPTURE(size);
    CHECK(mass(x, size) - mass(means, size) == Approx(lost).epsilon(0.06));
    CHECK(mass(grid, size) > mass(x, size));
  }
}

TEST_CASE("KVQuant's levels and outliers are worth something on heavy tails", "[kvquant]") {
  Matrix<float> x = gaussian(4000, 64, 12);
  for (float& v : x.storage) v = v * v * v + 5;  // and a mean that no symmetric code would like
  for (const Role role : {Role::kKey, Role::kValue}) {
    const auto error = [&](const Json& knobs) {
      return relative_error(round_trip(*trained("kvquant", knobs, unit_of(64, 1, role), x), x), x);
    };
    const double full = error({{"bits", 3}});
    CHECK(full < .85 * error({{"bits", 3}, {"datatype", "int"}}));
    CHECK(full < .6 * error({{"bits", 3}, {"outliers", 0}}));
    CHECK(error({{"bits", 4}}) < .5 * full);
  }
}

TEST_CASE("Q-Norm keeps mean and deviation of what is coded", "[kvquant]") {
  Matrix<float> x = gaussian(6000, 32, 13);
  for (float& v : x.storage) v = std::exp(.5f * v);
  for (const bool on : {false, true}) {
    const Json knobs = {{"bits", 2}, {"outliers", 0}, {"scale_aware", false}, {"q_norm", on}};
    const auto codec = trained("kvquant", knobs, unit_of(32), x);
    MemoryParameters p;
    codec->save(p);
    const auto& zero = p.tensors.at("zero").data;
    const auto& range = p.tensors.at("range").data;
    const Matrix<float> y = round_trip(*codec, x);
    double mean[2] = {0, 0}, square[2] = {0, 0};
    for (int64_t t = 0; t < x.rows; ++t)
      for (int64_t c = 0; c < x.cols; ++c)
        for (const int i : {0, 1}) {
          const double v = ((i == 0 ? x : y)(t, c) - zero[static_cast<size_t>(c)]) / range[static_cast<size_t>(c)];
          mean[i] += v / static_cast<double>(x.storage.size());
          square[i] += v * v / static_cast<double>(x.storage.size());
        }
    const double deviation[2] = {std::sqrt(square[0] - mean[0] * mean[0]), std::sqrt(square[1] - mean[1] * mean[1])};
    CHECK(mean[1] == Approx(mean[0]).margin(1e-3));  // k-means keeps the mean by itself
    if (on)
      CHECK(deviation[1] == Approx(deviation[0]).epsilon(1e-3));  // levels are stored in f16
    else
      CHECK(deviation[1] < .98 * deviation[0]);
    // 21.2: 32 bits a channel and 16 a level; with Q-Norm the encoder has levels of its own.
    CHECK(8 * codec->constant_bytes() == 32 * 32 + 16 * 4 * (on ? 2 : 1));
  }
}

TEST_CASE("scale-aware levels follow the loud channels, the others all alike", "[kvquant]") {
  // Channel 0 is loud and uniform, the seven others quiet with heavy tails.
  Rng rng(5);
  Matrix<float> x(4000, 8);
  for (int64_t t = 0; t < x.rows; ++t)
    for (int64_t c = 0; c < 8; ++c)
      x(t, c) = static_cast<float>(c == 0 ? 100 * rng.uniform() : .01 * std::pow(rng.normal(), 3));
  const auto error = [&](bool aware) {
    const Json knobs = {{"bits", 2}, {"outliers", 0}, {"scale_aware", aware}};
    return relative_error(round_trip(*trained("kvquant", knobs, unit_of(8), x), x), x);
  };
  CHECK(error(true) < .85 * error(false));
}

TEST_CASE("Fisher weights move the levels to where the gradients are, and are refused where there are none",
          "[kvquant]") {
  const Matrix<float> x = gaussian(3000, 16, 6);
  const Json knobs = {{"bits", 2}, {"outliers", 0}, {"weight", "fisher"}};
  Matrix<float> gradient(x.rows, x.cols);
  for (size_t i = 0; i < x.storage.size(); ++i) gradient.storage[i] = x.storage[i] > 0 ? 1.0f : 0.01f;
  const auto error_above = [&](const Codec& codec) {
    const Matrix<float> y = round_trip(codec, x);
    double sum = 0;
    for (size_t i = 0; i < x.storage.size(); ++i)
      if (x.storage[i] > 0) sum += std::pow(double{x.storage[i]} - y.storage[i], 2);
    return sum;
  };
  TrainSet set = train_set(x, unit_of(16));
  set.squared_gradient = gradient;
  const auto fisher = find_method("kvquant").make(knobs, unit_of(16));
  fisher->train(set, Rng(1));
  CHECK(error_above(*fisher) < .7 * error_above(*trained("kvquant", {{"bits", 2}, {"outliers", 0}}, unit_of(16), x)));

  CHECK(find_method("kvquant").needs(knobs).gradients);
  CHECK_FALSE(find_method("kvquant").needs({{"weight", "mass"}}).gradients);
  CHECK_THROWS_WITH(trained("kvquant", knobs, unit_of(16), x), Contains("weight: fisher needs the squared gradient"));
  gradient = Matrix<float>(x.rows, x.cols);
  set.squared_gradient = gradient;
  CHECK_THROWS_WITH(fisher->train(set, Rng(1)), Contains("weights of all values are zero"));
  // Behind a transform nothing is known of them.
  Json config = knobs;
  config["name"] = "kvquant";
  config["heads"] = 1;
  config["transform"] = {"center"};
  const auto chained = make_codec(resolve_codec(config, make_shape(1, 1, 1, 16)).units[0]);
  gradient.storage.assign(gradient.storage.size(), 1.0f);
  set.squared_gradient = gradient;
  CHECK_THROWS_WITH(chained->train(set, Rng(1)), Contains("nor behind a transform"));
}

TEST_CASE("KVQuant codes the same at one and four threads", "[kvquant]") {
  const int before = thread_count();
  const Matrix<float> x = gaussian(1000, 96, 21);
  for (const Role role : {Role::kKey, Role::kValue}) {
    std::vector<CodeBlock> codes(2);
    std::vector<MemoryParameters> saved(2);
    for (const size_t i : {0, 1}) {
      set_thread_count(i == 0 ? 1 : 4);
      const auto codec = trained("kvquant", {{"q_norm", true}}, unit_of(32, 3, role), x);
      codec->save(saved[i]);
      codec->encode(x, codes[i]);
    }
    CHECK(saved[0] == saved[1]);
    CHECK((codes[0].fields == codes[1].fields && codes[0].sides == codes[1].sides));
    REQUIRE(codes[0].overlay.size() == codes[1].overlay.size());
    bool same = true;
    for (size_t i = 0; i < codes[0].overlay.size(); ++i) {
      const OverlayEntry &a = codes[0].overlay[i], &b = codes[1].overlay[i];
      same = same && a.token == b.token && a.channel == b.channel && a.value == b.value;
    }
    CHECK(same);
  }
  set_thread_count(before);
}

TEST_CASE("KVQuant says why a unit can't be coded, and its presets what they are", "[kvquant]") {
  const Method& kvquant = find_method("kvquant");
  CHECK_THAT(kvquant.check(Json::object(), unit_of(2, 1, Role::kValue)), Contains("1 exact values at each end"));
  CHECK(kvquant.check({{"outliers", 0}}, unit_of(2, 1, Role::kValue)) == "");
  CHECK(kvquant.check(Json::object(), unit_of(2)) == "");
  CHECK_THAT(kvquant.check(Json::object(), unit_of(1 << 12, 8)), Contains("15 bits"));
  const CodecPlan plan = resolve_codec({{"name", "kvquant"}, {"preset", "nuq2"}}, make_shape(2, 9, 3, 64));
  REQUIRE(plan.skip == "");
  REQUIRE(plan.units.size() == 4);  // all heads of a layer and role together
  CHECK(plan.units[0].unit.rope == RopePlacement::kPre);
  CHECK((plan.units[0].knobs["bits"] == 2 && plan.units[0].knobs["q_norm"] == true));
  const Json cache = preset_cache_config({{"name", "kvquant"}, {"preset", "default"}});
  CHECK((cache["sinks"] == 1 && cache["window"] == 0 && cache["flush"] == 1));
}
