// quanto and hqq against what transformers' QuantizedCache keeps (tests/golden/make_quantized_cache_goldens.py). The
// tests say again, value by value, which group a place in memory belongs to.
#include <cmath>

#include "codec/build.h"
#include "codec/vq_support.h"
#include "core/error.h"
#include "core/json.h"
#include "io/atomic_file.h"
#include "support/catch.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

const Json& goldens() {
  static const Json all = [] {
    const std::string path = VQKV_SOURCE_DIR "/tests/golden/data/quantized_cache.json";
    return parse_json(read_file(path), path);
  }();
  return all;
}

struct Golden {
  int heads, tokens, head_dim;
  Matrix<float> x;  // (tokens, heads * head_dim)
  explicit Golden(const Json& given)
      : heads(static_cast<int>(given.size())),
        tokens(static_cast<int>(given[0].size())),
        head_dim(static_cast<int>(given[0][0].size())),
        x(tokens, int64_t{heads} * head_dim) {
    for (int64_t i = 0; i < int64_t{heads} * tokens * head_dim; ++i) {
      const auto [t, channel] = place(i);
      x(t, channel) =
          given[static_cast<size_t>(i / head_dim / tokens)][static_cast<size_t>(t)][static_cast<size_t>(i % head_dim)]
              .get<float>();
    }
  }
  // Token and channel of the unit of a place in memory.
  std::pair<int64_t, int64_t> place(int64_t i) const {
    return {i / head_dim % tokens, i / head_dim / tokens * head_dim + i % head_dim};
  }
  UnitShape unit() const {
    UnitShape u;
    u.head_dim = head_dim;
    u.heads = heads;
    return u;
  }
};

Json knobs_of(const Json& c, int tokens) {
  Json knobs = {{"bits", c["bits"]}, {"axis", c["axis"]}, {"group", c["group"]}};
  if (c.contains("dtype")) knobs["dtype"] = c["dtype"];
  if (c["backend"] == "hqq") knobs["tokens"] = tokens;
  return knobs;
}

// The library's number of the group of place i of n.
int64_t group_of(const Json& c, const Golden& g, int64_t i, int64_t n) {
  const int64_t group = c["group"], count = n / group, axis = c["axis"];
  if (axis == -1) return i % g.head_dim * (count / g.head_dim) + i / g.head_dim / group;
  return c["backend"] == "hqq" && axis == 0 ? i % count : i / group;
}

int code_of(const Json& c, int64_t i) {
  return std::stoi(c["codes"].get_ref<const std::string&>().substr(static_cast<size_t>(2 * i), 2), nullptr, 16);
}

}  // namespace

TEST_CASE("quanto's codes, scales and zeros are the library's, bit for bit", "[quanto][golden]") {
  int compared = 0;
  for (const Json& c : goldens()["cases"]) {
    if (c["backend"] != "quanto") continue;
    const Golden g(goldens()["x"][c["x"].get<std::string>()]);
    CAPTURE(c["bits"].get<int>(), c["axis"].get<int>(), c["dtype"].get<std::string>(), c["x"].get<std::string>());
    const auto codec = find_method("quanto").make(knobs_of(c, g.tokens), g.unit());
    CodeBlock codes;
    const Matrix<float> y = round_trip(*codec, g.x, &codes);
    const int64_t n = g.x.rows * g.x.cols;
    for (int64_t i = 0; i < n; ++i) {
      const auto [t, channel] = g.place(i);
      const auto group = static_cast<size_t>(group_of(c, g, i, n));
      REQUIRE(codes.fields[0][static_cast<size_t>(t * g.x.cols + channel)] == code_of(c, i));
      // scale * code - shift, all of the model's type: equal only where both are. The library rounds product and sum.
      const double scale = c["scale"][group].get<float>(), shift = c["zero"][group].get<float>();
      REQUIRE(y(t, channel) == static_cast<float>(scale * code_of(c, i) - shift));
      if (c.contains("decoded")) {
        const double theirs = c["decoded"][static_cast<size_t>(i)].get<double>();
        REQUIRE(std::abs(y(t, channel) - theirs) <= 0x1p-8 * (std::abs(scale * code_of(c, i)) + std::abs(theirs)));
      }
    }
    // Bytes hold codes of two groups at 4 bits: an odd one stands alone in them.
    const int64_t group = c["group"];
    const double alone =
        c["bits"] == 4 && n / group % 2 == 1 ? 4.0 * static_cast<double>(group) / static_cast<double>(n) : 0;
    CHECK(codec->layout().bits_per_token() / codec->channels() + alone ==
          Approx(c["allocated"].get<double>()).epsilon(1e-12));
    ++compared;
  }
  CHECK(compared == 15);
}

TEST_CASE("coding all of quanto's cache again at every flush gives what coding each token once does",
          "[quanto][golden]") {
  const Json& flushed = goldens()["flushed"];
  const Golden g(flushed["x"]);
  const auto codec = find_method("quanto").make({{"group", 16}}, g.unit());
  const Matrix<float> y = round_trip(*codec, g.x);
  double ours = 0, apart = 0;
  for (int64_t i = 0; i < g.x.rows * g.x.cols; ++i) {
    const auto [t, channel] = g.place(i);
    const double theirs = flushed["decoded"][static_cast<size_t>(i)].get<double>();
    ours += std::pow(y(t, channel) - double{g.x(t, channel)}, 2);
    apart += std::pow(y(t, channel) - theirs, 2);
    // Range and scale are rounded to 8 bits anew each time.
    REQUIRE(std::abs(y(t, channel) - theirs) <= 0x1p-6 * (std::abs(theirs) + 1));
  }
  CHECK(apart < 0.02 * ours);
  for (const Json& again : goldens()["again"]) {
    const double last = again["ratios"].back().get<double>();
    // The numbers of `explain hqq`: with axis 0 groups are others each time.
    if (again["backend"] == "hqq" && again["axis"] == 0)
      CHECK(last == Approx(again["bits"] == 4 ? 9.222 : 6.265));
    else
      CHECK(last < 1.01);
  }
}

TEST_CASE("hqq's codes are the package's", "[hqq][golden]") {
  int compared = 0;
  for (const Json& c : goldens()["cases"]) {
    if (c["backend"] != "hqq") continue;
    const Golden g(goldens()["x"][c["x"].get<std::string>()]);
    CAPTURE(c["bits"].get<int>(), c["axis"].get<int>(), c["dtype"].get<std::string>(), c["x"].get<std::string>());
    const auto codec = find_method("hqq").make(knobs_of(c, g.tokens), g.unit());
    CodeBlock codes;
    const Matrix<float> y = round_trip(*codec, g.x, &codes);
    const int64_t n = g.x.rows * g.x.cols;
    // The package adds up in fp32, in an order of its own: zeros may differ in last bits, which the 16-bit types round
    // away here.
    const double last = c["dtype"] == "f32" ? 0x1p-18 : 0;
    for (int64_t i = 0; i < n; ++i) {
      const auto [t, channel] = g.place(i);
      const auto group = static_cast<size_t>(group_of(c, g, i, n));
      const int code = codes.fields[0][static_cast<size_t>(t * g.x.cols + channel)];
      REQUIRE(code == code_of(c, i));
      const double scale = c["scale"][group].get<float>(), zero = c["zero"][group].get<float>();
      const double theirs = static_cast<float>(scale * (code - zero));
      REQUIRE(std::abs(y(t, channel) - theirs) <= last * scale * (std::abs(zero) + code));
    }
    CHECK(codec->layout().bits_per_token() / codec->channels() == Approx(c["allocated"].get<double>()).epsilon(1e-12));
    ++compared;
  }
  CHECK(compared == 20);
}

TEST_CASE("what the library refuses has a reason here, but for a last group that stays exact", "[quanto][hqq]") {
  for (const Json& r : goldens()["refused"]) {
    if (r["backend"] == "quanto") continue;  // 15 rows of a channel in groups of 16
    UnitShape unit;
    unit.heads = r["shape"][0];
    unit.head_dim = r["shape"][2];
    CAPTURE(r.dump());
    const Method& hqq = find_method("hqq");
    CHECK_FALSE(hqq.check(hqq.canonical(knobs_of(r, r["shape"][1]), "codec"), unit).empty());
  }
  const Method& quanto = find_method("quanto");
  CHECK(quanto.check(quanto.canonical({{"bits", 3}}, "codec"), unit_of(64)) == "quanto has codes of 2 and of 4 bits");
}
