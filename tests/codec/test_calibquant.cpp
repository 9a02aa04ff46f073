#include <cmath>

#include "codec/codec_set.h"
#include "codec/score_map.h"
#include "codec/transform_support.h"
#include "support/catch.h"
#include "support/codec_rows.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

std::unique_ptr<Codec> codec_of(const Json& knobs, const UnitShape& unit) {
  UnitSpec spec;
  spec.unit = unit;
  spec.method = "calibquant";
  spec.knobs = find_method("calibquant").canonical(knobs, "");
  spec.transforms = Json::array();
  return make_codec(spec);
}

std::unique_ptr<SequenceState> fit(const Codec& codec, Role role, ConstMatrix x) {
  return role == Role::kKey ? codec.fit(x, {}, {}) : codec.fit({}, x, {});
}

}  // namespace

// baseline-methods 5.9: both ends go toward zero, not toward the middle.
TEST_CASE("CalibQuant's toy: a range clipped toward zero, and a query that is folded once", "[calibquant][golden]") {
  Matrix<float> x(4, 1);
  x.storage = {-1, .2f, .9f, 3};
  for (const Role role : {Role::kKey, Role::kValue}) {
    const auto codec = codec_of({{"key_clip", 0.5}, {"value_clip", 0.5}}, unit_of(1, 1, role));
    const auto state = fit(*codec, role, x);
    CodeBlock codes;
    const Matrix<float> y = through(*codec, x, state.get(), &codes);
    CHECK(codes.fields[0] == std::vector<uint16_t>{0, 0, 1, 1});
    CHECK(y.storage == AlignedVector<float>{-.5f, -.5f, 1.5f, 1.5f});
    // q.k = (q s) code + q zero, s = 2 and zero = -s zp = -0.5.
    const DecodePlan plan = codec->plan({-1, state.get()});
    const float q = 2, folded = q * std::get<DiagonalMap>(plan.map).factor[0], beside = q * plan.outer_bias[0];
    const float scores[] = {-1, -1, 3, 3};
    for (size_t t = 0; t < 4; ++t) CHECK(folded * static_cast<float>(codes.fields[0][t]) + beside == scores[t]);
    CHECK(state->bytes() == 4);  // two f16 a channel
    CHECK(codec->constant_bytes() == 0);
    CHECK(codec->layout().bits_per_token() == 1);
  }
}

TEST_CASE("CalibQuant: each channel's range is the prompt's, for what follows too", "[calibquant]") {
  const UnitShape unit = unit_of(16, 2);
  const Data data(unit, 3);
  const ConstMatrix prompt = data.x.view().slice_rows(0, 200);
  const auto codec = codec_of({{"bits", 4}, {"key_clip", 1}}, unit);
  const auto state = fit(*codec, Role::kKey, prompt);
  const Matrix<float> y = through(*codec, data.x, state.get());
  for (int64_t c = 0; c < 32; ++c) {
    float low = prompt(0, c), high = low;
    for (int64_t t = 0; t < 200; ++t) {
      low = std::min(low, prompt(t, c));
      high = std::max(high, prompt(t, c));
    }
    const float step = (high - low) / 15;
    for (int64_t t = 0; t < 600; ++t)
      REQUIRE(y(t, c) == Approx(std::clamp(data.x(t, c), low, high)).margin(0.5 * step + 0.01 * (high - low)));
  }
}

// baseline-methods 1.3: relative error on N(0, 1) over 4,096 values of a channel.
TEST_CASE("CalibQuant's 1-bit error on Gaussian channels", "[calibquant][golden]") {
  const Matrix<float> x = gaussian(4096, 64, 9);
  for (const auto& [clip, expected] : {std::pair{0.5, 1.33}, {0.3, 0.439}}) {
    const auto codec = codec_of({{"key_clip", clip}}, unit_of(64, 1));
    CHECK(relative_error(through(*codec, x, fit(*codec, Role::kKey, x).get()), x) == Approx(expected).epsilon(0.03));
  }
}

TEST_CASE("CalibQuant's calibration of scores is the plan's, of keys alone", "[calibquant]") {
  const Json knobs = {{"low_shift", 0.25}, {"high_shift", 3}};
  const DecodePlan plan = codec_of(knobs, unit_of(16, 1))->plan();
  CHECK(plan.score.kind == ScoreMap::Kind::kRange);
  CHECK(plan.score.low_shift == 0.25f);
  CHECK(plan.score.high_shift == 3.0f);
  CHECK(codec_of(knobs, unit_of(16, 1, Role::kValue))->plan().score.kind == ScoreMap::Kind::kNone);
  CHECK(codec_of(Json::object(), unit_of(16, 1))->plan().score.kind == ScoreMap::Kind::kNone);
  float s[] = {-1, 4, -INFINITY, 9};
  map_scores(plan.score, s, 4);
  CHECK(s[0] == -0.75f);
  CHECK(s[1] == Approx(-0.75 + 5 * 6.75 / 10));
  CHECK(s[2] == -INFINITY);
  CHECK(s[3] == 6.0f);
}
