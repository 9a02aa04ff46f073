// simvq with keys in two branches by RoPE frequency: which channels are where, and that neither knows of the other.
#include <vector>

#include "codec/methods/branches.h"
#include "codec/vq_support.h"
#include "core/error.h"
#include "support/catch.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

using Channels = std::vector<int32_t>;

UnitShape rotating(int head_dim, int heads, int rotary_dim) {
  UnitShape u = unit_of(head_dim, heads);
  u.rope_facts = RopeFacts::plain(head_dim, rotary_dim, 10000.0);
  return u;
}

// Of 16 channels that rotate by 10000^(-p / 8), pairs 4 to 7 take over 600 tokens: 628, 1987, 6283, 19869.
const Json kKnobs = {{"codebooks", 5}, {"bits", 5}, {"rounds", 8}, {"low_codebooks", 2}, {"low_period", 600}};
const Channels kLow = {4, 5, 6, 7, 12, 13, 14, 15}, kHigh = {0, 1, 2, 3, 8, 9, 10, 11};

Matrix<float> columns(const Matrix<float>& x, const Channels& channel) {
  Matrix<float> out(x.rows, static_cast<int64_t>(channel.size()));
  for (int64_t r = 0; r < x.rows; ++r)
    for (size_t c = 0; c < channel.size(); ++c) out(r, static_cast<int64_t>(c)) = x(r, channel[c]);
  return out;
}

CodeBlock codes_of(const Codec& codec, ConstMatrix x) {
  CodeBlock out;
  codec.encode(x, out);
  return out;
}

}  // namespace

TEST_CASE("branches: channels are split between RoPE pairs, by the tokens of a turn", "[vq]") {
  CHECK(channels_by_period(rotating(16, 1, 16), 600, true) == kLow);
  CHECK(channels_by_period(rotating(16, 1, 16), 600, false) == kHigh);
  CHECK(channels_by_period(rotating(16, 2, 16), 6300, true) == Channels{7, 15, 23, 31});
  CHECK(channels_by_period(rotating(16, 1, 16), 6, true).size() == 16);
  CHECK(channels_by_period(rotating(16, 1, 16), 20000, true).empty());
  // Half of the channels rotate, by 10000^(-p / 4): 6, 63, 628, 6283 tokens a turn. The others are low.
  CHECK(channels_by_period(rotating(16, 1, 8), 100, true) == Channels{2, 3, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15});
  CHECK(channels_by_period(rotating(16, 1, 8), 100, false) == Channels{0, 1, 4, 5});
  // Stretched frequencies count as they are: 199 tokens become 796.
  UnitShape stretched = rotating(16, 1, 16);
  stretched.rope_facts.apply_linear(4);
  CHECK(channels_by_period(stretched, 600, true) == Channels{3, 4, 5, 6, 7, 11, 12, 13, 14, 15});
  CHECK(channels_by_period(unit_of(16), 1, true).size() == 16);
}

TEST_CASE("branches: each is the simvq of its channels alone", "[vq]") {
  for (const RopePlacement rope : {RopePlacement::kPost, RopePlacement::kPre}) {
    UnitShape unit = rotating(16, 1, 16);
    unit.rope = rope;
    const auto x = gaussian(2000, 16, 1), test = gaussian(300, 16, 2);
    const auto whole = trained("simvq", kKnobs, unit, x);
    CHECK(whole->rope() == rope);
    const CodeBlock codes = codes_of(*whole, test);
    REQUIRE(codes.fields.size() == 2);
    Matrix<float> decoded(test.rows, 16);
    whole->decode(codes, decoded);
    int stages[] = {2, 3};
    for (const int i : {0, 1}) {
      const Channels& channel = i == 0 ? kLow : kHigh;
      const auto alone = checked("simvq", {{"codebooks", stages[i]}, {"bits", 5}, {"rounds", 8}}, unit_of(8));
      const auto part = columns(x, channel);
      alone->train(train_set(part, unit_of(8)), Rng(1).split(static_cast<uint64_t>(i)));
      const auto rows = columns(test, channel);
      const CodeBlock of = codes_of(*alone, rows);
      CHECK(codes.fields[static_cast<size_t>(i)] == of.fields[0]);
      Matrix<float> y(rows.rows, 8);
      alone->decode(of, y);
      CHECK(columns(decoded, channel).storage == y.storage);
    }
  }
}

TEST_CASE("branches: what changes in one leaves the other's books and codes alone", "[vq]") {
  const UnitShape unit = rotating(16, 1, 16);
  const auto x = gaussian(2000, 16, 3), test = gaussian(100, 16, 4);
  const CodeBlock codes = codes_of(*trained("simvq", kKnobs, unit, x), test);
  for (const size_t changed : {0, 1}) {
    auto other_x = x, other_test = test;
    for (Matrix<float>* m : {&other_x, &other_test})
      for (int64_t r = 0; r < m->rows; ++r)
        for (const int32_t c : changed == 0 ? kLow : kHigh) (*m)(r, c) = 3 - 2 * (*m)(r, c);
    const CodeBlock other = codes_of(*trained("simvq", kKnobs, unit, other_x), other_test);
    CHECK(other.fields[1 - changed] == codes.fields[1 - changed]);
    CHECK(other.fields[changed] != codes.fields[changed]);
  }
}

TEST_CASE("branches: bits, books and levels", "[vq]") {
  const UnitShape unit = rotating(16, 1, 16);
  const auto x = gaussian(2000, 16, 5), test = gaussian(300, 16, 6);
  const auto codec = trained("simvq", kKnobs, unit, x);
  CHECK(codec->layout().bits_per_token() == 5 * 5);
  CHECK(codec->constant_bytes() == (2 + 3) * 32 * 8 * 2);  // books are half as wide as those of one branch
  REQUIRE(codec->levels() == 3);
  double last = 1e9;
  for (const auto& [level, low, high] : {std::tuple{0, 1, 1}, {1, 2, 2}, {2, 2, 3}}) {
    const CodeLayout layout = codec->level_layout(level);
    CHECK(layout.fields[0].slots == low);
    CHECK(layout.fields[1].slots == high);
    const double error = round_trip_mse(*codec, test, level);
    CHECK(error < last);
    last = error;
  }
  CHECK(round_trip_mse(*codec, test) == last);
  // One branch, whatever the period: the codes of before.
  Json one = kKnobs, plain = kKnobs;
  one["low_codebooks"] = 0;
  plain.erase("low_codebooks");
  plain.erase("low_period");
  CHECK(codes_of(*trained("simvq", one, unit, x), test).fields ==
        codes_of(*trained("simvq", plain, unit_of(16), x), test).fields);
}

TEST_CASE("branches: stored and read again, and refused for other channels", "[vq]") {
  const UnitShape unit = rotating(16, 2, 16);
  const auto x = gaussian(1000, 32, 7);
  const auto codec = trained("simvq", kKnobs, unit, x);
  Archive archive;
  codec->save(archive);
  const auto again = checked("simvq", kKnobs, unit);
  again->load(archive);
  const CodeBlock codes = codes_of(*codec, x);
  CHECK(codes_of(*again, x).fields == codes.fields);
  Matrix<float> a(x.rows, 32), b(x.rows, 32);
  codec->decode(codes, a);
  again->decode(codes, b);
  CHECK(a.storage == b.storage);

  // As many channels, but of other pairs.
  UnitShape other = unit;
  std::swap(other.rope_facts.inverse_frequency[0], other.rope_facts.inverse_frequency[7]);
  try {
    checked("simvq", kKnobs, other)->load(archive);
    FAIL("read");
  } catch (const Error& e) {
    CHECK(e.kind() == ErrorKind::kBadData);
    CHECK_THAT(e.what(), Catch::Contains("low/branch"));
  }
}

TEST_CASE("branches: what makes none is refused with the reason", "[vq]") {
  const Method& simvq = find_method("simvq");
  const auto reason = [&](const Json& change, const UnitShape& unit) {
    Json knobs = kKnobs;
    knobs.update(change);
    return simvq.check(knobs, unit);
  };
  const UnitShape unit = rotating(16, 1, 16);
  CHECK(reason(Json::object(), unit).empty());
  UnitShape value = unit;
  value.role = Role::kValue;
  CHECK_THAT(reason(Json::object(), value), Catch::Contains("give it for k alone"));
  CHECK(reason({{"low_codebooks", 0}}, value).empty());
  CHECK_THAT(reason({{"low_codebooks", 5}}, unit), Catch::Contains("5 of 5 codebooks"));
  CHECK_THAT(reason({{"low_period", 20000}}, unit), Catch::Contains("0 of 16 channels"));
  CHECK_THAT(reason({{"low_period", 6}}, unit), Catch::Contains("16 of 16 channels"));
  CHECK_THAT(reason(Json::object(), unit_of(16)), Catch::Contains("16 of 16 channels"));
}
