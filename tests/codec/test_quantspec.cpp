// QuantSpec's two nibbles: the dossier's worked example, the INT4 cache that the upper ones are, the error of both.
#include <cmath>

#include "codec/level.h"
#include "support/cache_shape.h"
#include "support/catch.h"
#include "support/codec_rows.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

Matrix<float> at_level(const Codec& codec, const CodeBlock& codes, int64_t rows, int level) {
  Matrix<float> y(rows, codec.channels());
  codec.decode(codes, y, {level});
  return y;
}

}  // namespace

// S = 0.2, the lower scale S / 16 = 0.0125 (both of a scale in float16).
TEST_CASE("QuantSpec's worked example: a nibble, and one for what it leaves over", "[quantspec][golden]") {
  const auto codec = find_method("quantspec").make(Json::object(), unit_of(5, 1, Role::kValue));
  Matrix<float> x(1, 5);
  x.storage = {-1, .37f, .88f, .895f, 2};
  CodeBlock codes;
  const Matrix<float> target = round_trip(*codec, x, &codes), draft = at_level(*codec, codes, 1, 0);
  CHECK(codes.fields[0] == std::vector<uint16_t>{0, 7, 9, 9, 15});
  CHECK(codes.fields[1][1] == 8 - 2);
  CHECK(codes.fields[1][2] == 8 + 6);
  CHECK(codes.fields[1][3] == 15);  // 7.6 lower steps round to 8, which has no code
  const float of_draft[] = {-1, .4f, .8f, .8f, 2}, of_target[] = {-1, .375f, .875f, .8875f, 2};
  for (size_t i = 0; i < 5; ++i) {
    CHECK(draft.storage[i] == Approx(of_draft[i]).margin(1e-3));
    CHECK(target.storage[i] == Approx(of_target[i]).margin(1e-3));
  }
}

TEST_CASE("upper nibbles are the INT4 cache, both an INT8 one", "[quantspec][golden]") {
  for (const Role role : {Role::kKey, Role::kValue})
    for (const int heads : {1, 2}) {
      CAPTURE(role_name(role), heads);
      const UnitShape unit = unit_of(16, heads, role);
      const auto codec = find_method("quantspec").make({{"group", 16}}, unit);
      const auto int4 = find_method("rtn").make(
          {{"bits", 4}, {"group", 16}, {"axis", role == Role::kKey ? "channel" : "token"}}, unit);
      const Matrix<float> x = gaussian(64, unit.channels(), 3);
      CodeBlock codes, plain;
      const Matrix<float> target = round_trip(*codec, x, &codes), draft = at_level(*codec, codes, 64, 0);
      CHECK(draft.storage == round_trip(*int4, x, &plain).storage);
      CHECK(codes.sides == plain.sides);
      int clamped = 0;
      for (int64_t t = 0; t < 64; ++t)
        for (int64_t c = 0; c < x.cols; ++c) {
          const int64_t side = role == Role::kKey ? t / 16 * x.cols + c : t * heads + c / 16;
          const double scale = codes.sides[0][static_cast<size_t>(side)],
                       error = std::abs(double{target(t, c)} - x(t, c));
          // Half a lower step, and a whole one where its last code is too near; the range's ends are rounded to
          // float16.
          const bool last = codes.fields[1][static_cast<size_t>(t * x.cols + c)] == 15;
          clamped += last && error > scale / 32;
          CHECK(error <= scale / (last ? 16 : 32) + 0.004);
        }
      CHECK(clamped > 0);
      CHECK(relative_error(target, x) < relative_error(draft, x) / 100);
    }
}

TEST_CASE("the upper nibbles alone are a level, with their own bits", "[quantspec][tiers]") {
  const std::shared_ptr<const Codec> codec = find_method("quantspec").make(Json::object(), unit_of(128));
  CHECK(codec->layout().bits_per_token() == 128 * 8.25);
  CHECK(codec->level_layout(0).bits_per_token() == 128 * 4.25);
  const auto level = codec_level(codec, 1);
  const Matrix<float> x = gaussian(128, 128, 5);
  CodeBlock whole, cut;
  codec->encode(x, whole);
  level->encode(x, cut);
  Matrix<float> y(128, 128);
  level->decode(cut, y);
  CHECK(y.storage == at_level(*codec, whole, 128, 0).storage);
  CHECK(cut.fields[1].empty());
}
