// Transforms one behind another, and the codecs behind them.
#include <cmath>

#include "codec/codec_set.h"
#include "codec/transform/transform.h"
#include "codec/transform_support.h"
#include "core/error.h"
#include "core/rng.h"
#include "support/catch.h"
#include "support/dummy_codecs.h"
#include "support/memory_parameters.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

struct Coded {
  std::unique_ptr<Codec> codec, loaded;  // loaded: from what codec saved
  CodeBlock block;
};

// Trained on `data`, whose rows it gives back to within `margin`; what it saves is what it loads.
Coded round_trip(const UnitSpec& spec, const Data& data, double margin) {
  REQUIRE(spec.check() == "");
  Coded out{make_codec(spec), make_codec(spec), {}};
  out.codec->train(data.set, Rng(2));
  out.codec->encode(data.x, out.block);
  Matrix<float> y(data.x.rows, data.x.cols);
  out.codec->decode(out.block, y);
  for (size_t i = 0; i < y.storage.size(); ++i) REQUIRE(y.storage[i] == Approx(data.x.storage[i]).margin(margin));
  MemoryParameters saved, again;
  out.codec->save(saved);
  out.loaded->load(saved);
  out.loaded->save(again);
  CHECK(saved == again);
  return out;
}

}  // namespace

TEST_CASE("what stands behind a narrower code sees its width", "[transform][width][chain]") {
  const UnitShape unit = unit_of(16, 2);
  Data data(unit, 14);
  // Every second half of a head repeats the first, and a quarter of the channels is silent: both narrowings lose
  // nothing.
  for (int64_t r = 0; r < data.x.rows; ++r)
    for (int64_t c = 0; c < 32; ++c) data.x(r, c) = c % 4 == 2 ? 0.0f : c % 16 >= 8 ? data.x(r, c - 8) : data.x(r, c);
  const Json prune = {{"name", "prune_channels"}, {"ratio", 0.25}}, low = {{"name", "low_rank"}},
             heads = {{"name", "token_scale"}, {"per", "head"}};
  const auto named = [](const char* name) { return Json{{"name", name}}; };
  const std::vector<Json> chains = {Json::array({prune, heads, named("center"), named("rotation")}),
                                    Json::array({heads, prune, named("channel_scale"), named("hadamard")}),
                                    Json::array({named("center"), low, named("token_scale"), named("hadamard")}),
                                    Json::array({named("token_scale"), low, named("center"), named("channel_scale")}),
                                    Json::array({named("query_metric"), low, named("rotation")}),
                                    Json::array({prune, low})};
  for (const Json& chain : chains) {
    CAPTURE(chain.dump());
    UnitSpec spec;
    spec.unit = unit;
    spec.method = "exact";
    spec.knobs = {{"dtype", "f32"}};
    spec.transforms = Json::array();
    for (const Json& t : chain) {
      Json entry = find_transform(t["name"].get<std::string>())
                       .canonical(
                           [&] {
                             Json knobs = t;
                             knobs.erase("name");
                             return knobs;
                           }(),
                           "t");
      entry["name"] = t["name"];
      spec.transforms.push_back(entry);
    }
    round_trip(spec, data, 2e-2);
  }
  // A head's codes of a pruned unit are its own.
  UnitSpec spec;
  spec.unit = unit;
  spec.method = "pq";
  spec.knobs = find_method("pq").canonical({{"codebooks", 5}, {"bits", 2}}, "codec");
  spec.transforms = Json::array({prune});
  CHECK_THAT(spec.check(), Catch::Contains("behind its transforms the unit has 2 heads of 12 channels"));
  spec.knobs["codebooks"] = 8;
  const auto codec = make_codec(spec);
  codec->train(data.set, Rng(2));
  const DecodePlan plan = codec->plan();
  CHECK(plan.channels == 32);
  CHECK(plan.code_channels == 24);
  CHECK(columns_of(plan.map, 24, 16, 16).row == 12);
  CHECK(columns_of(plan.map, 24, 16, 16).rows <= 12);
}

TEST_CASE("a chain decodes through one plan what its transforms would undo one by one", "[transform][chain]") {
  const char* chains[][4] = {{"center", "", "", ""},
                             {"center", "token_scale", "", ""},
                             {"center", "channel_scale", "token_scale", "hadamard"},
                             {"token_scale", "center", "rotation", ""},
                             {"hadamard", "center", "token_scale", "channel_scale"},
                             {"center", "query_metric", "hadamard", "identity"}};
  for (const auto& names : chains)
    for (const RopePlacement rope : {RopePlacement::kPost, RopePlacement::kPre}) {
      const UnitShape unit = unit_of(16, 2, Role::kKey, rope);
      const Data data(unit, 21);
      UnitSpec spec;
      spec.unit = unit;
      spec.method = "exact";
      spec.knobs = {{"dtype", "f32"}};
      spec.transforms = Json::array();
      for (const char* name : names)
        if (*name) spec.transforms.push_back({{"name", name}});
      CAPTURE(spec.transforms.dump());
      const Coded coded = round_trip(spec, data, 2e-3);
      CHECK(coded.codec->plan().layout.sides.size() == coded.codec->layout().sides.size());
      CodeBlock other;
      coded.loaded->encode(data.x, other);
      CHECK(other.sides == coded.block.sides);
    }
}

TEST_CASE("token scales take their groups and storage", "[transform][chain]") {
  const UnitShape unit = unit_of(16, 2, Role::kValue);
  for (const auto& [knobs, slots] :
       {std::pair{Json{{"per", "unit"}}, 1}, {Json{{"per", "head"}}, 2}, {Json{{"per", "channels"}, {"width", 8}}, 4}})
    for (const char* by : {"rms", "absmax", "l2"}) {
      UnitSpec spec;
      spec.unit = unit;
      spec.method = "exact";
      spec.knobs = {{"dtype", "f32"}};
      Json t = knobs;
      t["name"] = "token_scale";
      t["by"] = by;
      spec.transforms = {t};
      const auto codec = make_codec(spec);
      CHECK(codec->layout().sides.back().slots == slots);
      CHECK(codec->layout().bits_per_token() == 32 * 32 + 16 * slots);
      const Matrix<float> x = keys(5, 32, 31);
      CodeBlock block;
      codec->encode(x, block);
      const int width = 32 / slots;
      for (int64_t r = 0; r < 5; ++r)
        for (int g = 0; g < slots; ++g) {
          double expected = 0;
          for (int c = g * width; c < (g + 1) * width; ++c)
            expected =
                *by == 'a' ? std::max(expected, std::abs(double{x(r, c)})) : expected + double{x(r, c)} * x(r, c);
          if (*by == 'r') expected /= width;
          if (*by != 'a') expected = std::sqrt(expected);
          CHECK(block.sides.back()[static_cast<size_t>(r * slots + g)] == Approx(expected).epsilon(1e-3));
        }
    }
}

TEST_CASE("moments and queries follow the keys through a chain", "[transform][chain]") {
  // A recorder as the inner codec sees what it is trained on.
  struct Recorder final : DummyCodec {
    Recorder(const UnitShape& unit, Matrix<float>* x, Matrix<float>* q, Matrix<float>* m)
        : DummyCodec(unit), x_(x), q_(q), m_(m) {
      layout_.sides = {{"x", DType::kF32, channels(), true}};
    }
    static void copy(ConstMatrix from, Matrix<float>& to) {
      to = Matrix<float>(from.rows, from.cols);
      for (int64_t r = 0; r < from.rows; ++r) std::copy_n(from.row(r), from.cols, to.row(r));
    }
    TrainReport train(const TrainSet& s, const Rng&) override {
      for (const auto& [from, to] : {std::pair{s.x, x_}, {s.queries, q_}, {s.query_moment, m_}}) copy(from, *to);
      return {};
    }
    FitNeeds fit_needs() const override { return {.tokens = 20, .queries = true}; }
    std::unique_ptr<SequenceState> fit(ConstMatrix k, ConstMatrix, ConstMatrix queries) const override {
      copy(k, *x_);
      copy(queries, *q_);
      return nullptr;
    }
    void encode(ConstMatrix, CodeBlock&, const SequenceState*) const override {}
    DecodePlan plan(const PlanQuery&) const override { return empty_plan(); }
    Matrix<float>*x_, *q_, *m_;
  };
  const UnitShape unit = unit_of(16, 1);
  const Data data(unit, 41);
  std::vector<std::unique_ptr<Transform>> chain;
  for (const char* name : {"center", "channel_scale", "rotation", "hadamard"})
    chain.push_back(find_transform(name).make(Json::object(), unit));
  Matrix<float> x, q, m;
  const auto codec = with_transforms(std::move(chain), std::make_unique<Recorder>(unit, &x, &q, &m), unit);
  // q'.(k'_a - k'_b) = q.(k_a - k_b): centring shifts all scores of a query alike
  const auto check = [&](const Matrix<float>& queries, const Matrix<float>& keys) {
    REQUIRE(q.rows == queries.rows);
    REQUIRE(x.rows == keys.rows);
    for (int64_t r = 0; r < 20; ++r) {
      double before = 0, after = 0;
      for (int64_t c = 0; c < 16; ++c) {
        before += double{queries(r, c)} * (keys(r, c) - keys(r + 1, c));
        after += double{q(r, c)} * (x(r, c) - x(r + 1, c));
      }
      CHECK(after == Approx(before).epsilon(1e-3).margin(1e-2));
    }
  };
  codec->train(data.set, Rng(1));
  check(data.queries, data.x);
  const Matrix<float> expected = moment_of(q, 16);
  for (size_t i = 0; i < expected.storage.size(); ++i)
    CHECK(m.storage[i] == Approx(expected.storage[i]).epsilon(1e-2).margin(1.0));
  // Those of a prompt likewise.
  CHECK(codec->fit_needs().tokens == 20);
  CHECK(codec->fit_needs().queries);
  const Data prompt(unit, 43);
  codec->fit(prompt.x, prompt.x, prompt.queries);
  check(prompt.queries, prompt.x);
}

TEST_CASE("exceptions pass through diagonal chains and are refused behind others", "[transform][chain][overlay]") {
  const UnitShape unit = unit_of(16, 1, Role::kValue);
  const Data data(unit, 51);
  const auto chain_of = [&](std::initializer_list<const char*> names) {
    std::vector<std::unique_ptr<Transform>> chain;
    for (const char* name : names) chain.push_back(find_transform(name).make(Json::object(), unit));
    return chain;
  };
  for (const bool add : {false, true}) {
    const auto codec =
        with_transforms(chain_of({"center", "channel_scale"}), std::make_unique<SparseDummy>(unit, 2, add), unit);
    codec->train(data.set, Rng(1));
    CodeBlock block;
    codec->encode(data.x, block);
    Matrix<float> y(data.x.rows, 16);
    codec->decode(block, y);
    REQUIRE(block.overlay.size() == 1200);
    for (const OverlayEntry& e : block.overlay) {
      CHECK(y(e.token, e.channel) == Approx(data.x(e.token, e.channel)).epsilon(5e-3).margin(2e-2));
      CHECK(e.value == round_side(DType::kF16, e.value));  // what a cache holds is what a sweep measures
    }
  }
  CHECK_THROWS_AS(with_transforms(chain_of({"hadamard"}), std::make_unique<SparseDummy>(unit, 2, false), unit), Error);
  CHECK_THROWS_AS(
      with_transforms(chain_of({"token_scale"}), std::make_unique<TableDummy>(unit, TableDummy::Options{}), unit),
      Error);
  CHECK_NOTHROW(
      with_transforms(chain_of({"hadamard"}), std::make_unique<TableDummy>(unit, TableDummy::Options{}), unit));
}

TEST_CASE("a codec with its own token scale composes behind a map", "[transform][chain]") {
  const UnitShape unit = unit_of(16, 1);
  const Data data(unit, 61);
  std::vector<std::unique_ptr<Transform>> chain;
  chain.push_back(find_transform("center").make(Json::object(), unit));
  chain.push_back(find_transform("hadamard").make(Json::object(), unit));
  auto inner = std::make_unique<TableDummy>(unit, TableDummy::Options{});
  const Codec* raw = inner.get();
  const auto codec = with_transforms(std::move(chain), std::move(inner), unit);
  codec->train(data.set, Rng(1));
  CodeBlock block;
  codec->encode(data.x, block);
  Matrix<float> direct(data.x.rows, 16), rotated(data.x.rows, 16), back(data.x.rows, 16);
  codec->decode(block, direct);
  raw->decode(block, rotated);  // what the inner codec says, still rotated
  find_transform("hadamard").make(Json::object(), unit)->forward(rotated, back);  // its own inverse
  std::vector<double> mean(16, 0);
  for (int64_t r = 0; r < data.x.rows; ++r)
    for (size_t c = 0; c < 16; ++c) mean[c] += data.x(r, static_cast<int64_t>(c)) / static_cast<double>(data.x.rows);
  for (int64_t r = 0; r < data.x.rows; ++r)
    for (int64_t c = 0; c < 16; ++c)
      REQUIRE(direct(r, c) == Approx(back(r, c) + mean[static_cast<size_t>(c)]).margin(1e-4));
}

TEST_CASE("block codecs stand behind transforms", "[transform][chain][block]") {
  const UnitShape unit = unit_of(16, 1);
  const Data data(unit, 71);
  std::vector<std::unique_ptr<Transform>> chain;
  chain.push_back(find_transform("token_scale").make(Json::object(), unit));
  chain.push_back(find_transform("rotation").make(Json::object(), unit));
  const auto codec = with_transforms(std::move(chain), std::make_unique<BlockDummy>(unit, 12, 4, 8), unit);
  codec->train(data.set, Rng(1));
  CodeBlock block;
  codec->encode(data.x, block);
  CHECK(block.sides.back().size() == 600);
  Matrix<float> y(data.x.rows, 16);
  codec->decode(block, y);
  double error = 0, power = 0;
  for (size_t i = 0; i < y.storage.size(); ++i) {
    error += std::pow(double{y.storage[i]} - data.x.storage[i], 2);
    power += std::pow(double{data.x.storage[i]}, 2);
  }
  CHECK(error / power < 1e-3);
}
