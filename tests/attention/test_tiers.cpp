// Coded tiers by age: every backend against the double reference, blocks against steps, the bytes, and the forms of
// tokens as they pass from tier to tier.
#include "attention/backends_cpu.h"
#include "attention/plan_cases.h"
#include "attention/scan_cpu.h"
#include "cache/coding.h"
#include "cache/keep_rule.h"
#include "codec/build.h"
#include "codec/level.h"
#include "core/error.h"
#include "core/json.h"
#include "support/catch.h"
#include "support/dummy_codecs.h"
#include "support/train_data.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

std::shared_ptr<const CodecSet> join(const std::vector<std::shared_ptr<const CodecSet>>& tiers,
                                     std::vector<int64_t> tokens) {
  std::vector<TrainedUnit> units;
  for (size_t t = 0; t < tiers.size(); ++t)
    for (TrainedUnit u : tiers[t]->units()) {
      u.spec.tier = static_cast<int>(t);
      units.push_back(std::move(u));
    }
  return std::make_shared<CodecSet>(tiers[0]->shape(), Json::object(), std::move(units), "", std::move(tokens));
}

// Levels of one residual code, and another codec behind them for values.
std::shared_ptr<const CodecSet> levels(const CacheShape& shape) {
  const CodecPlan plan = resolve_codec(parse_json(R"({"tiers": [
      {"tokens": 64, "name": "rvq", "preset": "embedded", "codebooks": 6, "bits": 4, "group": 16},
      {"tokens": 32, "level": 4}, {"k": {"level": 2}, "v": {"name": "pq", "codebooks": 16, "bits": 4}}]})",
                                                  "test"),
                                       shape);
  REQUIRE(plan.skip == "");
  return train_codec_set(plan, shape, MadeUp(300), {});
}

// One rule for both roles, one for each, KIVI's, and no window at all.
std::vector<CachePolicy> policies() {
  return {policy_of(4, {40, 32}, {40, 32}), policy_of(3, {40, 32}, {9, 16}), policy_of(0, {1, 32}, {33, 1}),
          policy_of(5, {0, 32}, {0, 32})};
}

// Another case whose keys stand on the same side of RoPE.
const Case& partner(const std::vector<Case>& all, size_t i) {
  const auto rope = [](const Case& c) { return c.name.find("before RoPE") != std::string::npos; };
  for (size_t j = 1; j < all.size(); ++j)
    if (const Case& other = all[(i + j) % all.size()]; rope(other) == rope(all[i]) && other.name != all[i].name)
      return other;
  return all[i];
}

// Without the numbers in a failure's message.
bool same(const Replay& a, const Replay& b) { return a.out.storage == b.out.storage; }

// What CodecSet refuses in tiers.
bool of_one_tier(const Case& c, const CacheShape& shape) {
  const DecodePlan plan = set_of(c, shape, 1)->units()[0].codec->plan();
  return plan.score.kind != ScoreMap::Kind::kNone || plan.query != QueryForm::kExact;
}

}  // namespace

TEST_CASE("Two tiers: cpu-reconstruct equals the double reference on every form of plan", "[tiers]") {
  const auto reference = make_attention_backend("reference"), fast = make_attention_backend("cpu-reconstruct");
  const CacheShape shape = make_shape(1, 3, 2, 64);
  std::vector<Case> all;
  for (const Case& c : cases())
    if (!of_one_tier(c, shape)) all.push_back(c);
  const Tokens x(shape, 230, 21);
  for (size_t i = 0; i < all.size(); ++i) {
    CAPTURE(all[i].name, partner(all, i).name);
    const auto set = join({set_of(all[i], shape, 1), set_of(partner(all, i), shape, 2)}, {64});
    const CachePolicy policy = policy_of(4, {40, 32}, {32, 32});
    const Replay want = replay(set, policy, *reference, x, 23), got = replay(set, policy, *fast, x, 23);
    CHECK(worst_difference(want.out, got.out) < tolerance(8, 64));
    CHECK(want.coded_share() == Approx(got.coded_share()).epsilon(1e-5));
    CHECK(same(replay(set, policy, *fast, x, 1), got));
    // The older tier is there: alone the newer gives something else.
    CHECK(worst_difference(want.out, replay(set_of(all[i], shape, 1), policy, *reference, x, 23).out) > 1e-3);
  }
}

TEST_CASE("Three tiers: every backend gives the reference's rows, blocks those of steps", "[tiers]") {
  const CacheShape shape = make_shape(2, 3, 2, 64);
  const auto reference = make_attention_backend("reference");
  const Tokens x(shape, 330, 5);
  const Case table{"table", [](DecodePlan& p, Role) { add_table(p, 6, 4); }};
  const Case scaled{"scaled", [](DecodePlan& p, Role) {
                      add_table(p, 8, 8, 2);
                      add_map(p, 5);
                      add_token_scale(p, 1);
                      p.outer_bias = random_bias(p.channels, 7);
                    }};
  for (const auto& set :
       {levels(shape), join({set_of(scaled, shape, 2), set_of(table, shape, 1), set_of(scaled, shape, 1)}, {32, 96})})
    for (const CachePolicy& policy : policies()) {
      CAPTURE(policy.sinks, policy.k.window, policy.v.flush, set->units()[0].spec.method);
      const Replay want = replay(set, policy, *reference, x, 330);
      CHECK(same(replay(set, policy, *reference, x, 1), want));
      struct Way {
        std::string name;
        std::unique_ptr<AttentionBackend> backend;
      };
      std::vector<Way> ways;
      for (const char* name : {"cpu-reconstruct", "cpu-table", "cpu-table8", "auto"})
        ways.push_back({name, make_attention_backend(name)});
      ways.push_back({"sums", make_tiled_backend(KeyScan::kFixed, ValueSums::kAlways)});
      ways.push_back({"decoded keys, sums", make_tiled_backend(KeyScan::kNone, ValueSums::kAlways)});
      for (const auto& [name, backend] : ways) {
        CAPTURE(name);
        const Replay got = replay(set, policy, *backend, x, 47);
        const double scan = name == "cpu-reconstruct" ? 0
                            : name == "cpu-table8"    ? scan::kByteScanLimit
                                                      : scan::kScanLimit;
        CHECK(worst_difference(want.out, got.out) < tolerance(8, 64) + 2.0 * 6.0 * scan);
        CHECK(want.coded_share() == Approx(got.coded_share()).epsilon(name == "cpu-table8" ? 0.1 : 1e-2));
        if (name == "auto") continue;  // may take another path for a step
        CHECK(same(replay(set, policy, *backend, x, 1), got));
        CHECK(same(replay(set, policy, *backend, x, 330), got));
      }
    }
}

TEST_CASE("auto takes a path that every tier can go, while older tiers are empty too", "[tiers]") {
  const CacheShape shape = make_shape(1, 3, 2, 64);
  const Case table{"table", [](DecodePlan& p, Role) { add_table(p, 4, 3); }};
  const Case grid{"grid", [](DecodePlan& p, Role) { add_levels(p, 2, 1, 16, false); }, 32};
  const Tokens x(shape, 230, 21);
  const auto reference = make_attention_backend("reference");
  for (const auto& set : {join({set_of(table, shape, 1), set_of(grid, shape, 2)}, {64}),
                          join({set_of(grid, shape, 1), set_of(table, shape, 2)}, {64})}) {
    const auto chosen = make_attention_backend("auto");
    const CachePolicy policy = policy_of(4, {32, 32}, {32, 32});
    const Replay want = replay(set, policy, *reference, x, 1), got = replay(set, policy, *chosen, x, 1);
    CHECK(worst_difference(want.out, got.out) < tolerance(8, 64) + 2.0 * 6.0 * scan::kScanLimit);
  }
}

TEST_CASE("Probabilities of a block with tiers are those of the reference", "[tiers]") {
  struct Tap final : AttentionTap {
    std::vector<Matrix<float>> seen;
    void on_probabilities(int, int, int64_t, ConstMatrix p) override {
      Matrix<float> copy(p.rows, p.cols);
      for (int64_t r = 0; r < p.rows; ++r) std::copy_n(p.row(r), p.cols, copy.row(r));
      seen.push_back(std::move(copy));
    }
  };
  const CacheShape shape = make_shape(1, 2, 2, 64);
  const auto set = levels(shape);
  const Tokens x(shape, 300, 8);
  std::vector<Tap> taps(2);
  for (const size_t i : {0, 1}) {
    const auto backend = make_attention_backend(i == 0 ? "reference" : "cpu-reconstruct");
    CompressedCache cache(set, policy_of(4, {40, 32}, {9, 32}));
    KvSessionCpu session(cache, *backend);
    session.set_tap(&taps[i]);
    Matrix<float> out(150, x.q.cols);
    for (const int64_t t : {0, 150}) {
      session.begin_block(150, Visibility::kReplay);
      session.attend(0, x.q.view().slice_rows(t, 150), x.k.view().slice_rows(t, 150), x.v.view().slice_rows(t, 150),
                     out);
      session.end_block();
    }
  }
  REQUIRE(taps[0].seen.size() == taps[1].seen.size());
  for (size_t i = 0; i < taps[0].seen.size(); ++i) CHECK(worst_difference(taps[0].seen[i], taps[1].seen[i]) < 1e-4);
}

TEST_CASE("Tiers: the ledger equals the memory resource and the formula at every length", "[tiers][ledger]") {
  const CacheShape shape = make_shape(2, 1, 2, 64);
  const auto backend = make_attention_backend("cpu-reconstruct");
  const Case blocks{"blocks", [](DecodePlan& p, Role) { add_levels(p, 2, 1, 16, false); }, 32};
  const Case table{"table", [](DecodePlan& p, Role) { add_table(p, 5, 4); }};
  const Tokens x(shape, 520, 3);
  for (const auto& set : {levels(shape), join({set_of(table, shape, 1), set_of(blocks, shape, 2)}, {32}),
                          join({set_of(blocks, shape, 1), set_of(table, shape, 2)}, {96})})
    for (const CachePolicy& policy :
         {policy_of(4, {40, 32}, {40, 32}), policy_of(0, {1, 32}, {65, 32}), policy_of(5, {0, 32}, {9, 32})})
      for (const int64_t step : {1, 29, 200}) {
        CAPTURE(policy.sinks, policy.k.window, step);
        bool same = true;
        replay(set, policy, *backend, x, step, Visibility::kReplay,
               [&](const CompressedCache& cache, const CountingResource& memory) {
                 const ByteLedger held = cache.bytes();
                 same = same && held.total_sequence() == memory.live() &&
                        canonical_json(held.to_json()) ==
                            canonical_json(ledger_at(*set, policy, cache.length()).to_json());
               });
        CHECK(same);
      }
  // Exact exceptions: what leaves a tier takes its own along.
  const Case overlay{"overlay", [](DecodePlan& p, Role) { add_table(p, 8, 4); }, 1, 3};
  bool same = true;
  int64_t most = 0, last = 0;
  replay(join({set_of(overlay, shape, 1), set_of(table, shape, 1)}, {64}), policy_of(4, {40, 32}, {40, 32}), *backend,
         x, 13, Visibility::kReplay, [&](const CompressedCache& cache, const CountingResource& memory) {
           same = same && cache.bytes().total_sequence() == memory.live();
           most = std::max(most, last = cache.bytes().overlay);
         });
  CHECK(same);
  CHECK(last > 0);
  // 8 units, two exceptions a token and the pointer to them.
  CHECK(8 * most < 8 * 128 * (2 * CodeLayout::kExceptionBits + CodeLayout::kExceptionPointerBits));
}

TEST_CASE("A token keeps its first codes, cut or coded again from what they decode to", "[tiers]") {
  const CacheShape shape = make_shape(1, 1, 2, 64);
  const auto set = levels(shape);
  const auto backend = make_attention_backend("reference");
  const Tokens x(shape, 330, 5);
  const CachePolicy policy = policy_of(4, {40, 32}, {40, 32});
  const auto run = [&](int64_t block, bool exact_prompt) {
    auto cache = std::make_unique<CompressedCache>(set, policy);
    KvSessionCpu session(*cache, *backend);
    Matrix<float> out(330, x.q.cols);
    for (int64_t t = 0; t < 330; t += block) {
      const int64_t n = std::min(block, 330 - t);
      session.begin_block(n, exact_prompt ? Visibility::kExactPrefill : Visibility::kReplay);
      session.attend(0, x.q.view().slice_rows(t, n), x.k.view().slice_rows(t, n), x.v.view().slice_rows(t, n),
                     MutMatrix(out).slice_rows(t, n));
      session.end_block();
    }
    session.end_exact_prefill();
    return cache;
  };
  const auto steps = run(1, false), blocks = run(170, false), prompt = run(330, true);
  CHECK(steps->coded_end(Role::kKey, 330) == 4 + 256);
  const CacheView view(*steps);
  CHECK(view.coded_end(Role::kKey, 330, 1) == 4 + 192);
  CHECK(view.coded_end(Role::kKey, 330, 2) == 4 + 160);
  for (const Role role : {Role::kKey, Role::kValue})
    for (int tier = 0; tier < 3; ++tier) {
      CAPTURE(role_name(role), tier);
      const auto unit = static_cast<size_t>(set->unit_index(0, 1, role, tier));
      CHECK(view.slot_begin(unit) == std::vector<int64_t>{192, 160, 0}[static_cast<size_t>(tier)]);
      CHECK(view.slots(unit) == std::vector<int64_t>{64, 32, 160}[static_cast<size_t>(tier)]);
      const CodeBlock held = view.fetch_codes(unit);
      for (const auto* other : {&blocks, &prompt}) CHECK(CacheView(**other).fetch_codes(unit).fields == held.fields);
      CHECK_THROWS(view.fetch_codes(unit, view.slot_begin(unit) + view.slots(unit), 1));
      if (tier < 2) CHECK_THROWS(view.fetch_codes(unit, 0, 1));

      // From the exact rows, as stored.
      const Codec& whole = *set->units()[static_cast<size_t>(set->unit_index(0, 1, role))].codec;
      const int64_t first = 4 + view.slot_begin(unit), n = view.slots(unit);
      Matrix<float> rows(n, 64);
      for (int64_t t = 0; t < n; ++t) {
        std::copy_n((role == Role::kKey ? x.k : x.v).row(first + t) + 64, 64, rows.row(t));
        const auto position = static_cast<int32_t>(first + t);
        if (role == Role::kKey) rope_apply(view.rope(), &position, rows.view().slice_rows(t, 1));
        policy.round_exact(rows.row(t), 64, [](int64_t) { return std::string("a test"); });
      }
      CodeBlock codes;
      whole.encode(rows, codes);
      if (tier > 0) {
        const Codec& own = *set->units()[unit].codec;
        const auto middle = codec_level(set->units()[static_cast<size_t>(set->unit_index(0, 1, role))].codec, 4);
        CodeBlock cut = cut_codes(codes, whole.layout(), tier == 1 ? own.layout() : middle->layout());
        if (tier == 2 && role == Role::kKey) cut = cut_codes(cut, middle->layout(), own.layout());
        if (tier == 2 && role == Role::kValue) {
          Matrix<float> decoded(n, 64);
          middle->decode(cut, decoded);
          own.encode(decoded, cut);
        }
        codes = std::move(cut);
      }
      CHECK(codes.fields == held.fields);
    }
  CHECK(steps->bytes().total_sequence() == blocks->bytes().total_sequence());
}

TEST_CASE("Rollbacks with tiers reach into the exact window, and no tier's boundary", "[tiers]") {
  const CacheShape shape = make_shape(1, 1, 1, 64);
  const auto set = levels(shape);
  const auto backend = make_attention_backend("cpu-reconstruct");
  const CachePolicy policy = policy_of(4, {40, 32}, {40, 32});
  const Tokens x(shape, 330, 5);
  CompressedCache cache(set, policy);
  KvSessionCpu session(cache, *backend);
  const auto feed = [&](int64_t from, int64_t n) {
    Matrix<float> out(n, x.q.cols);
    session.begin_block(n, Visibility::kReplay);
    session.attend(0, x.q.view().slice_rows(from, n), x.k.view().slice_rows(from, n), x.v.view().slice_rows(from, n),
                   out);
    session.end_block();
    return out;
  };
  feed(0, 300);
  CHECK(cache.coded_end(Role::kKey, 300) == 4 + 256);
  CHECK_THROWS_WITH(cache.truncate(4 + 255), Catch::Contains("are coded"));
  CHECK_THROWS_WITH(cache.truncate(4 + 190), Catch::Contains("are coded"));
  const Matrix<float> once = feed(300, 20);
  cache.truncate(300);
  CHECK(feed(300, 20).storage == once.storage);
  cache.truncate(4 + 256);
  feed(4 + 256, 40);  // the boundaries stay where they were
  CHECK(cache.bytes().total_sequence() > 0);
}

TEST_CASE("What can't have tiers is refused by name", "[tiers]") {
  const CacheShape shape = make_shape(1, 1, 1, 64);
  const auto set = levels(shape);
  const auto message = [&](CachePolicy policy) -> std::string {
    try {
      CompressedCache(set, std::move(policy));
    } catch (const Error& e) {
      CHECK(e.kind() == ErrorKind::kUsage);
      return e.what();
    }
    return "no error";
  };
  CHECK_THAT(message(policy_of(4, {128, 64}, {128, 32})),
             Catch::Contains("codec.tiers[1].tokens: 32 is") && Catch::Contains("64, the flush of cache.k"));
  CHECK_THAT(message(policy_of(4, {1, 32}, {129, 128})),
             Catch::Contains("codec.tiers[0].tokens: 64 is") && Catch::Contains("cache.v"));
  for (const char* name : {"h2o", "snapkv"})
    CHECK_THAT(message(CachePolicy::from_json({{"flush", 32}, {"policy", name}})),
               Catch::Contains(name) && Catch::Contains("tiers"));
  CHECK(message(CachePolicy::from_json({{"flush", 64}, {"policy", "streaming"}})) == "no error");  // holds no codes

  CompressedCache cache(set, policy_of(4, {40, 32}, {40, 32}));
  CHECK_THROWS_WITH(cache.begin_block(1, Visibility::kAllCoded), Catch::Contains("codec.tiers"));
  const int64_t position = 0;
  CHECK_THROWS_WITH(cache.evict(0, 0, {&position, 1}), Catch::Contains("tiers"));

  const auto fitted = dummy_codec_set(shape, RopePlacement::kPost, 1,
                                      [](const UnitShape& unit) { return std::make_unique<PromptDummy>(unit); });
  const auto backend = make_attention_backend("reference");
  CHECK_THROWS_WITH(replay(join({fitted, exact_codec_set(shape)}, {64}), policy_of(4, {40, 32}, {40, 32}), *backend,
                           Tokens(shape, 100, 3), 100),
                    Catch::Contains("codec.tiers") && Catch::Contains("'dummy'") && Catch::Contains("each prompt"));
}
