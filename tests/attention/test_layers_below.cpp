// Codecs whose codes are what the layer below leaves over, through every attention path.
#include "attention/plan_codec.h"
#include "core/error.h"
#include "support/catch.h"
#include "support/dummy_codecs.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

// Layer 0 by a table with a map, biases and token scales, or by levels with exact exceptions; the others add to it.
std::shared_ptr<const CodecSet> stacked(const CacheShape& shape, RopePlacement rope, int heads, bool table) {
  return dummy_codec_set(shape, rope, heads, [&](const UnitShape& unit) -> std::unique_ptr<Codec> {
    if (unit.layer > 0) return std::make_unique<LowerDummy>(unit);
    if (table) return std::make_unique<TableDummy>(unit, TableDummy::Options());
    return std::make_unique<SparseDummy>(unit, 2, true);
  });
}

CachePolicy policy_with(int64_t sinks, FlushRule k, FlushRule v) {
  CachePolicy policy;
  policy.sinks = sinks;
  policy.k = k;
  policy.v = v;
  return policy;
}

double squared_error(const ConstMatrix a, const ConstMatrix b) {
  double sum = 0;
  for (int64_t t = 0; t < a.rows; ++t)
    for (int64_t c = 0; c < a.cols; ++c) sum += std::pow(a(t, c) - b(t, c), 2);
  return sum;
}

}  // namespace

TEST_CASE("rows of the layer below are added alike by every path, in blocks and in steps", "[lower]") {
  const CacheShape shape = make_shape(3, 3, 2, 16);
  const CachePolicy policy = policy_with(4, {40, 32}, {33, 32});
  const Tokens x(shape, 300, 31);
  for (const RopePlacement rope : {RopePlacement::kPost, RopePlacement::kPre})
    for (const int heads : {1, 2})
      for (const bool table : {false, true}) {
        const auto set = stacked(shape, rope, heads, table);
        const auto reference = make_attention_backend("reference");
        const Replay want = replay(set, policy, *reference, x, 43);
        CHECK(want.coded_share() > 0.2);
        for (const char* path : {"cpu-reconstruct", "auto"}) {
          CAPTURE(static_cast<int>(rope), heads, table, path);
          const auto backend = make_attention_backend(path);
          const Replay blocks = replay(set, policy, *backend, x, 43), steps = replay(set, policy, *backend, x, 1);
          CHECK(worst_difference(want.out, blocks.out) < 1e-4);
          CHECK(blocks.out.storage == steps.out.storage);
        }
      }
}

TEST_CASE("what the layer below leaves over is coded, and coded from what it decodes to", "[lower]") {
  const CacheShape shape = make_shape(3, 1, 2, 16);
  const CachePolicy policy = policy_with(4, {40, 32}, {33, 32});
  const Tokens x(shape, 300, 33);
  const auto set = stacked(shape, RopePlacement::kPre, 2, false);
  CompressedCache cache(set, policy);
  cache.begin_block(300);
  for (int layer = 0; layer < 3; ++layer) cache.append(layer, x.k, x.v);
  cache.end_block();
  const CacheView view(cache);
  // The same rows in every layer: each codes the error of the one below.
  double before = 0;
  for (int layer = 0; layer < 3; ++layer) {
    const auto unit = static_cast<size_t>(view.unit_of(layer, 0, Role::kKey));
    const Matrix<float> rows = view.decode_codes(unit, 0, view.slots(unit));
    REQUIRE(rows.rows >= 224);
    const double error = squared_error(rows, x.k.view().slice_rows(4, rows.rows));
    CHECK(error > 0);
    if (layer > 0) CHECK(error < before / 16);
    before = error;
    // A part of the slots decodes to that part of the rows.
    const Matrix<float> part = view.decode_codes(unit, 70, 90);
    for (int64_t t = 0; t < 90; ++t) REQUIRE(std::equal(part.row(t), part.row(t) + part.cols, rows.row(70 + t)));
  }
}

TEST_CASE("paths that read codes alone refuse plans that add the layer below", "[lower]") {
  const LowerDummy codec({.head_dim = 16, .heads = 1, .layer = 1});
  for (const char* path : {"cpu-table", "cpu-table8"}) {
    const auto reason = make_attention_backend(path)->can(codec.plan(), Role::kKey);
    REQUIRE(reason);
    CHECK(!make_attention_backend(path)->can(codec.plan(), Role::kValue));  // decoded where sums can't
  }
  DecodePlan table = empty_plan(16);
  add_table(table, 4, 4);
  CHECK(!make_attention_backend("cpu-table")->can(table, Role::kKey));
  table.adds_lower = true;
  CHECK_THAT(*make_attention_backend("cpu-table")->can(table, Role::kKey), Catch::Contains("the layer below"));
  for (const char* path : {"reference", "cpu-reconstruct", "auto"})
    CHECK(!make_attention_backend(path)->can(table, Role::kKey));
}

TEST_CASE("values that add the layer below are not summed by code", "[lower]") {
  const CacheShape shape = make_shape(2, 2, 1, 16);
  const auto of = [&](bool adds) {
    return make_set(shape, 1, [&](Role, int channels) -> std::shared_ptr<const Codec> {
      DecodePlan p = empty_plan(channels);
      add_table(p, 4, 4);
      struct Adds final : Codec {
        Adds(DecodePlan of, bool lower) : inner(std::move(of)), adds_lower(lower) {}
        int channels() const override { return inner.channels(); }
        const CodeLayout& layout() const override { return inner.layout(); }
        RopePlacement rope() const override { return inner.rope(); }
        TrainReport train(const TrainSet&, const Rng&) override { return {}; }
        bool sees_lower() const override { return adds_lower; }
        void encode(ConstMatrix x, CodeBlock& out, const SequenceState* s) const override { inner.encode(x, out, s); }
        DecodePlan plan(const PlanQuery& q) const override {
          DecodePlan out = inner.plan(q);
          out.adds_lower = adds_lower;
          return out;
        }
        void save(ParameterWriter&) const override {}
        void load(const ParameterReader&) override {}
        PlanCodec inner;
        bool adds_lower;
      };
      return std::make_shared<Adds>(p, adds);
    });
  };
  const Tokens x(shape, 1600, 37);
  const CachePolicy policy = policy_with(0, {16, 16}, {16, 16});
  const auto reference = make_attention_backend("reference");
  for (const bool adds : {false, true}) {
    const auto set = of(adds);
    CompressedCache fast(set, policy), slow(set, policy);
    const auto path = make_attention_backend("auto");
    KvSessionCpu a(fast, *path), b(slow, *reference);
    for (int64_t t = 0; t < 1600; t += t == 0 ? 1599 : 1) {
      const int64_t n = t == 0 ? 1599 : 1;
      for (int layer = 0; layer < 2; ++layer) {
        if (layer == 0) {
          a.begin_block(n, Visibility::kReplay);
          b.begin_block(n, Visibility::kReplay);
        }
        Matrix<float> got(n, x.q.cols), want(n, x.q.cols);
        const auto rows = [&](const Matrix<float>& m) { return m.view().slice_rows(t, n); };
        a.attend(layer, rows(x.q), rows(x.k), rows(x.v), got);
        b.attend(layer, rows(x.q), rows(x.k), rows(x.v), want);
        CHECK(worst_difference(got, want) < 1e-3);
      }
      a.end_block();
      b.end_block();
    }
    for (const std::string& ran : path->paths()) CHECK((!adds || ran == "cpu-reconstruct"));
  }
}

TEST_CASE("codecs that see the layer below: what the set and the cache refuse", "[lower]") {
  const CacheShape shape = make_shape(2, 1, 2, 16);
  const auto below = [&](const char* what, int heads, RopePlacement rope, int block) {
    std::vector<TrainedUnit> units;
    const auto lower = dummy_codec_set(
        shape, rope, heads, [&](const UnitShape& unit) { return std::make_unique<PositionDummy>(unit, block); });
    const auto upper = dummy_codec_set(shape, RopePlacement::kPost, 2,
                                       [](const UnitShape& unit) { return std::make_unique<PositionDummy>(unit); });
    for (const TrainedUnit& u : lower->units())
      if (u.spec.unit.layer == 0) units.push_back(u);
    for (TrainedUnit u : upper->units()) {
      if (u.spec.unit.layer == 0) continue;
      u.codec = std::make_shared<LowerDummy>(u.spec.unit);
      units.push_back(u);
    }
    INFO(what);
    CHECK_THROWS_WITH(CodecSet(shape, Json::object(), units, ""), Catch::Contains(what) && Catch::Contains("layer 1"));
  };
  below("the same heads", 1, RopePlacement::kPost, 1);
  below("the same side of RoPE", 2, RopePlacement::kPre, 1);
  below("a block of tokens that divides its own", 2, RopePlacement::kPost, 32);

  const auto set = stacked(shape, RopePlacement::kPost, 1, false);
  CHECK(set->sees_lower());
  CHECK(set->lower_unit(static_cast<size_t>(set->unit_index(0, 1, Role::kValue))) == -1);
  CHECK(set->lower_unit(static_cast<size_t>(set->unit_index(1, 1, Role::kValue))) ==
        set->unit_index(0, 1, Role::kValue));
  const CachePolicy h2o = CachePolicy::from_json(parse_json(R"({"policy": "h2o"})", "test"));
  CHECK_THROWS_WITH(CompressedCache(set, h2o), Catch::Contains("h2o") && Catch::Contains("the layer below"));
  CompressedCache cache(set, policy_with(4, {40, 32}, {33, 32}));
  CHECK_THROWS_WITH(cache.evict(0, 0, std::vector<int64_t>{}), Catch::Contains("none can be given up"));
}
