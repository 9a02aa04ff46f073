// Queries rounded where they meet coded keys: ggml's q8_0, behind its rotation or none, and where it is refused.
#include <cmath>

#include "codec/build.h"
#include "codec/query_form.h"
#include "codec/transform/transform.h"
#include "codec/vq_support.h"
#include "core/error.h"
#include "core/json.h"
#include "support/catch.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

const Json kRounded = {{"type", "q4_0"}, {"query", "q8"}};

UnitSpec spec_of(const Json& knobs, const Json& transforms, int heads = 1, Role role = Role::kKey) {
  UnitSpec spec;
  spec.unit = unit_of(64, heads, role);
  spec.method = "ggml";
  spec.knobs = find_method("ggml").canonical(knobs, "test");
  spec.transforms = transforms;
  return spec;
}

Matrix<float> random_rows(int64_t rows, int64_t cols) {
  Rng rng(7);
  Matrix<float> m(rows, cols);
  for (float& v : m.storage) v = static_cast<float>(rng.normal() * (1 + rng.uniform()));
  return m;
}

}  // namespace

TEST_CASE("a query rounds as q8_0: by hand", "[query]") {
  // Scale 63.5 / 127 = 0.5: halves of it go away from zero.
  std::vector<float> x(64, 0.0f);
  x[0] = -63.5f;
  x[1] = 0.25f;
  x[2] = -0.25f;
  x[3] = 0.24f;
  x[4] = 10.74f;
  x[5] = -10.76f;
  // The scale 1 / 127 is 0.00787353515625 in float16, and codes are those of 1 / 127 all the same.
  x[32] = 1.0f;
  x[33] = -0.5f;  // -63.5 steps
  round_q8_0(x.data(), 64);
  CHECK(x[0] == -63.5f);
  CHECK(x[1] == 0.5f);
  CHECK(x[2] == -0.5f);
  CHECK(x[3] == 0.0f);
  CHECK(x[4] == 10.5f);
  CHECK(x[5] == -11.0f);
  CHECK(x[31] == 0.0f);
  CHECK(x[32] == 0.99993896484375f);
  CHECK(x[33] == -0.50390625f);  // 64 steps
  std::vector<float> none(32, 0.0f);
  round_q8_0(none.data(), 32);
  CHECK(none == std::vector<float>(32, 0.0f));
  std::vector<float> bad(32, 1.0f);
  bad[3] = std::nanf("");
  round_q8_0(bad.data(), 32);
  CHECK(std::isnan(bad[3]));
  bad[3] = INFINITY;
  round_q8_0(bad.data(), 32);
  CHECK(!std::isfinite(bad[3]));
}

TEST_CASE("a query rounds as the codec q8_0 does, whose bytes are ggml's", "[query]") {
  const Matrix<float> x = random_rows(200, 64);
  const auto codec = find_method("ggml").make({{"type", "q8_0"}}, unit_of(64));
  CodeBlock block;
  codec->encode(x, block);
  Matrix<float> want(x.rows, x.cols), got = x;
  codec->decode(block, want);
  for (int64_t r = 0; r < x.rows; ++r) round_q8_0(got.row(r), 64);
  CHECK(got.storage == want.storage);
}

TEST_CASE("rounded queries of a rotated cache: behind the rotation, head by head", "[query]") {
  for (const bool signs : {false, true}) {
    const Json turn = {{"name", "hadamard"}, {"block", 0}, {"signs", signs}, {"seed", 3}};
    const auto codec = make_codec(spec_of(kRounded, Json::array({turn}), 2));
    const DecodePlan plan = codec->plan();
    check_plan(plan);
    CHECK(plan.query == QueryForm::kQ8);
    const std::vector<double> map = dense_of(plan.map, 128, 128);
    const Matrix<float> rows = random_rows(8, 128), q = random_rows(4, 64);
    CodeBlock block;
    codec->encode(rows, block);
    Matrix<float> k(8, 128);
    codec->decode(block, k);
    for (int head = 0; head < 2; ++head)
      for (int64_t i = 0; i < q.rows; ++i) {
        CAPTURE(signs, head, i);
        const CodedQueries queries(plan, head, 64);
        std::vector<float> y(64), x(64), turned(64);
        queries.in_codes(q.row(i), y.data());
        queries.in_keys(q.row(i), x.data());
        for (size_t c = 0; c < 64; ++c) {
          double sum = 0;
          for (size_t j = 0; j < 64; ++j)
            sum += map[(static_cast<size_t>(head) * 64 + c) * 128 + static_cast<size_t>(head) * 64 + j] *
                   static_cast<double>(q(i, static_cast<int64_t>(j)));
          turned[c] = static_cast<float>(sum);
        }
        round_q8_0(turned.data(), 64);
        for (size_t c = 0; c < 64; ++c) CHECK(y[c] == Approx(turned[c]).margin(1e-6));
        for (int64_t t = 0; t < 8; ++t) {  // y . codes = x . key
          double by_codes = 0, by_key = 0;
          for (int64_t c = 0; c < 64; ++c) {
            const int64_t at = t * 128 + head * 64 + c;
            const double scale = block.sides[0][static_cast<size_t>(at / 32)];
            by_codes += static_cast<double>(y[static_cast<size_t>(c)]) * scale *
                        (block.fields[0][static_cast<size_t>(at)] - 8.0);
            by_key += static_cast<double>(x[static_cast<size_t>(c)]) * k(t, head * 64 + c);
          }
          CHECK(by_key == Approx(by_codes).margin(1e-4));
        }
      }
  }
}

TEST_CASE("ggml: rounding queries changes neither codes nor bytes, is off by default and for keys alone", "[query]") {
  const Matrix<float> x = random_rows(20, 64);
  const auto exact = make_codec(spec_of({{"type", "q5_1"}}, Json::array())),
             rounded = make_codec(spec_of({{"type", "q5_1"}, {"query", "q8"}}, Json::array()));
  CHECK(exact->plan().query == QueryForm::kExact);
  CHECK(CodedQueries(exact->plan(), 0, 64).exact());
  CodeBlock a, b;
  exact->encode(x, a);
  rounded->encode(x, b);
  CHECK(a.fields == b.fields);
  CHECK(a.sides == b.sides);
  CHECK(exact->constant_bytes() == rounded->constant_bytes());

  const auto reason = [](const UnitSpec& spec) { return spec.check(); };
  CHECK(reason(spec_of(kRounded, Json::array())).empty());
  CHECK(reason(spec_of(kRounded, Json::array({Json{{"name", "identity"}}}))).empty());
  CHECK_THAT(reason(spec_of(kRounded, Json::array(), 1, Role::kValue)), Catch::Contains("give it for k alone"));
  UnitSpec before = spec_of(kRounded, Json::array());
  before.unit.rope = RopePlacement::kPre;
  CHECK_THAT(reason(before), Catch::Contains("keys after RoPE alone"));
  const Json turn = {{"name", "hadamard"}, {"block", 0}, {"signs", false}, {"seed", 0}};
  for (const char* other : {"center", "channel_scale", "rotation"}) {
    CAPTURE(other);
    Json t = find_transform(other).canonical(Json::object(), "test");
    t["name"] = other;
    CHECK_THAT(reason(spec_of(kRounded, Json::array({t}))), Catch::Contains("drop the other transforms"));
    CHECK(reason(spec_of({{"type", "q4_0"}}, Json::array({t}))).empty());
  }
  CHECK_THAT(reason(spec_of(kRounded, Json::array({turn, turn}))), Catch::Contains("drop the other transforms"));
  CHECK_THROWS_AS(find_method("ggml").canonical({{"query", "q4"}}, "test"), Error);
}
