// Rules of which tokens a head keeps: what they give up, when they decide, what a cache does with it.
#include <fmt/format.h>

#include <cmath>
#include <optional>

#include "attention/plan_codec.h"
#include "cache/keep_rule.h"
#include "cache/policies/kinds.h"
#include "cache/view.h"
#include "codec/codec.h"
#include "codec/transform/transform.h"
#include "core/json.h"
#include "support/catch.h"
#include "support/dummy_codecs.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

CachePolicy policy_from(const char* text) { return CachePolicy::from_json(parse_json(text, "test")); }

std::string refusal(const char* text) {
  try {
    policy_from(text);
  } catch (const Error& e) {
    CHECK(e.kind() == ErrorKind::kUsage);
    return e.what();
  }
  return "accepted";
}

std::vector<int32_t> up_to(int32_t n) {
  std::vector<int32_t> out(static_cast<size_t>(n));
  for (int32_t i = 0; i < n; ++i) out[static_cast<size_t>(i)] = i;
  return out;
}

std::shared_ptr<const CodecSet> table_set(const CacheShape& shape, int heads) {
  return make_set(shape, heads, [](Role, int channels) {
    DecodePlan p = empty_plan(channels);
    add_table(p, 8, 4);
    return std::make_shared<PlanCodec>(p);
  });
}

// What a head receives is made up: the same for a token whatever block its queries come in.
void feed_to(CompressedCache& cache, const Tokens& x, int64_t to, int64_t block,
             Visibility visibility = Visibility::kReplay) {
  while (cache.length() < to) {
    const int64_t first = cache.length(), n = std::min({block, to - first, cache.block_limit()});
    cache.begin_block(n, visibility);
    for (int layer = 0; layer < cache.shape().layers; ++layer) {
      cache.append(layer, x.k.view().slice_rows(first, n), x.v.view().slice_rows(first, n));
      const MassRequest mass = cache.observe(layer);
      for (int64_t q = mass.from; q < mass.to; ++q)
        for (int h = 0; h < cache.shape().kv_heads; ++h) {
          const auto seen = CacheView(cache).seen(layer, h);
          for (size_t c = 0; c < seen.size() && seen[c] <= q; ++c)
            mass.received[static_cast<size_t>(h)][c] += static_cast<double>((seen[c] * (7 + h) + q + layer) % 13);
        }
    }
    cache.end_block();
  }
}

}  // namespace

TEST_CASE("h2o gives up what received least of what is not recent", "[policy][golden]") {
  // heavy 1, recent 1: after the fourth token the sums are 2.2, 1.0, .5, .3; token 3 is recent, 0 is heaviest.
  const CachePolicy policy = policy_from(R"({"policy": {"name": "h2o", "heavy": 1, "recent": 1, "interval": 1}})");
  const std::vector<double> received = {2.2, 1.0, 0.5, 0.3};
  CHECK(policy.keep->give_up(up_to(4), received, 4, 0) == std::vector<int64_t>{1, 2});
  CHECK(policy.keep->give_up(up_to(4), received, 4, 2) == std::vector<int64_t>{});  // sinks stay beside the budget
  CHECK(policy.keep->give_up(up_to(4), std::vector<double>(4, 1.0), 4, 0) ==
        std::vector<int64_t>{1, 2});  // ties: first
  CHECK(policy.keep->next_decision(0, 0) == 1);
  // Fractions are of the tokens so far, and a decision comes every interval, after a prompt from its end on.
  const CachePolicy parts = policy_from(R"({"policy": {"name": "h2o", "heavy": 0.25, "recent": 0.5, "interval": 10}})");
  CHECK(parts.keep->give_up(up_to(8), std::vector<double>{1, 5, 3, 4, 0, 0, 0, 0}, 8, 0) == std::vector<int64_t>{0, 2});
  CHECK(parts.keep->next_decision(9, 0) == 10);
  CHECK(parts.keep->next_decision(10, 0) == 20);
  CHECK(parts.keep->next_decision(9, 64) == 64);
  CHECK(parts.keep->next_decision(64, 64) == 74);
}

TEST_CASE("snapkv pools what the last queries gave and keeps the highest", "[policy][golden]") {
  const auto policy = [](const char* pooling, int budget) {
    return policy_from(fmt::format(R"({{"policy": {{"name": "snapkv", "budget": {}, "observe": 2, "kernel": 3,
                                       "pooling": "{}"}}}})",
                                   budget, pooling)
                           .c_str());
  };
  // Pooled over three: .1167 .1233 .1733 .0833 .0767 (avg, zeros beyond the ends) or .3 .3 .3 .2 .2 (max).
  const std::vector<double> received = {.05, .30, .02, .20, .03, 9, 9};
  CHECK(policy("avg", 3).keep->give_up(up_to(7), received, 7, 0) == std::vector<int64_t>{0, 1, 3, 4});
  CHECK(policy("max", 3).keep->give_up(up_to(7), received, 7, 0) == std::vector<int64_t>{1, 2, 3, 4});
  CHECK(policy("avg", 5).keep->give_up(up_to(7), received, 7, 0) == std::vector<int64_t>{3, 4});
  CHECK(policy("avg", 7).keep->give_up(up_to(7), received, 7, 0).empty());  // nothing to give up
  CHECK(policy("avg", 0).keep->give_up(up_to(7), received, 7, 0).size() == 5);
  CHECK(policy("avg", 3).keep->next_decision(0, 300) == 300);
  CHECK(policy("avg", 3).keep->next_decision(300, 300) == KeepRule::kNever);
  CHECK(policy("avg", 3).keep->next_decision(1024, 0) == 2048);
  CHECK(policy("avg", 3).keep->observed_from(300) == 298);
}

TEST_CASE("policies that decide: configured, canonical, refused by name", "[policy]") {
  const auto canonical = [](const char* text) { return canonical_cache_config(parse_json(text, "test")); };
  CHECK(canonical(R"({"policy": "h2o"})") == canonical(R"({"policy": {"name": "h2o", "heavy": 0.1, "interval": 64}})"));
  CHECK(canonical(R"({"policy": {"name": "h2o", "heavy": 64}})") ==
        canonical(R"({"policy": {"name": "h2o", "heavy": 64.0}})"));
  for (const char* text : {R"({"policy": "h2o"})", R"({"policy": {"name": "snapkv", "budget": 0.25}})"})
    CHECK(canonical_cache_config(canonical(text)) == canonical(text));
  CHECK_THAT(refusal(R"({"policy": {"name": "h2o", "hevy": 3}})"), Catch::Contains("did you mean 'heavy'"));
  CHECK_THAT(refusal(R"({"policy": {"name": "h2o", "heavy": 3.5}})"),
             Catch::Contains("cache.policy.heavy: expected a fraction below 1"));
  CHECK_THAT(refusal(R"({"policy": {"name": "h2o", "interval": 0}})"), Catch::Contains("cache.policy.interval"));
  CHECK_THAT(refusal(R"({"policy": {"name": "snapkv", "kernel": 4}})"),
             Catch::Contains("cache.policy.kernel: expected an odd number, found 4"));
  CHECK_THAT(refusal(R"({"policy": {"name": "snapkv", "pooling": "mean"}})"), Catch::Contains("allowed: max, avg"));
  CHECK_THAT(refusal(R"({"policy": {"name": "snapkv", "budget": 31}})"),
             Catch::Contains("budget: expected a fraction below 1, or at least the 32 observing tokens, found 31"));
  CHECK(refusal(R"({"policy": {"name": "snapkv", "observe": 64, "interval": 32}})") ==
        "cache.policy.observe: expected at most the 32 tokens of cache.policy.interval, found 64");
  for (const char* name : {"h2o", "snapkv"})
    CHECK_THAT(refusal(fmt::format(R"({{"policy": "{}", "rule": "none"}})", name).c_str()),
               Catch::Contains("rule 'none'"));
  const CacheShape shape = make_shape(1, 1, 2, 16);
  const auto set = table_set(shape, 1);
  const CachePolicy h2o = policy_from(R"({"policy": "h2o"})");
  CHECK_THROWS_WITH(ledger_at(*set, h2o, 1000), Catch::Contains("h2o: heavy 0.1"));
  CompressedCache cache(set, h2o);
  CHECK_THROWS_WITH(cache.begin_block(10, Visibility::kAllCoded), Catch::Contains("fake-quant"));
  CHECK_THROWS_WITH(cache.begin_block(10, Visibility::kExactPrefill), Catch::Contains("decides at its end"));
  // Nobody observed, or what attention gave is no number.
  const Tokens x(shape, 64, 3);
  for (const bool asked : {false, true}) {
    CompressedCache other(set, h2o);
    other.begin_block(64);
    other.append(0, x.k, x.v);
    if (asked) other.observe(0).received[1][40] = NAN;
    CHECK_THROWS_WITH(other.end_block(),
                      Catch::Contains(asked ? "KV head 1: what token 40 received is nan" : "no attention"));
  }
}

TEST_CASE("a policy's cache: within its budget, counted to the byte, alike in steps and blocks", "[policy][ledger]") {
  const CacheShape shape = make_shape(2, 1, 4, 16);
  const Tokens x(shape, 600, 5);
  struct Way {
    std::string config;
    int64_t most;  // tokens a head has right after a decision, sinks included
  };
  for (const Way& way : {Way{R"({"name": "h2o", "heavy": 40, "recent": 30, "interval": 50})", 4 + 40 + 30},
                         Way{R"({"name": "h2o", "heavy": 0, "recent": 0, "interval": 20})", 4},
                         Way{R"({"name": "snapkv", "budget": 90, "observe": 16, "interval": 100})", 4 + 90}})
    for (const int heads : {1, 2, 4}) {
      CAPTURE(way.config, heads);
      const auto set = table_set(shape, heads);
      const CachePolicy policy =
          policy_from(fmt::format(R"({{"policy": {}, "sinks": 4, "window": 48, "flush": 16}})", way.config).c_str());
      CompressedCache steps(set, policy);
      feed_to(steps, x, 600, 1);
      for (const int64_t block : {7, 64, 600}) {
        CountingResource memory;
        {
          CompressedCache cache(set, policy, &memory);
          for (int64_t to = 0; to < 600;) {
            to = std::min<int64_t>(600, cache.length() + std::min(block, cache.block_limit()));
            const bool decides = to == cache.length() + cache.block_limit();
            feed_to(cache, x, to, block);
            REQUIRE(cache.bytes().total_sequence() == memory.live());
            for (int layer = 0; decides && layer < 2; ++layer)
              for (int h = 0; h < 4; ++h)
                REQUIRE(static_cast<int64_t>(CacheView(cache).seen(layer, h).size()) <= std::min(to, way.most));
          }
          const CacheView a(cache), b(steps);
          for (int layer = 0; layer < 2; ++layer) {
            for (int h = 0; h < 4; ++h) CHECK(a.seen(layer, h) == b.seen(layer, h));
            for (const size_t u : a.layer_units(layer)) {
              CHECK(a.fetch_codes(u).fields == b.fetch_codes(u).fields);
              const auto mine = a.slot_positions(u), theirs = b.slot_positions(u);
              CHECK(std::equal(mine.begin(), mine.end(), theirs.begin(), theirs.end()));
            }
          }
          CHECK(cache.bytes().to_json() == steps.bytes().to_json());
          // Heads decide apart; units of one head free the bytes of theirs.
          if (way.most > 4) CHECK(a.seen(0, 0) != a.seen(0, 1));
          CompressedCache all(set, policy_from(R"({"sinks": 4, "window": 48, "flush": 16})"));
          feed_to(all, x, 600, 600);
          if (heads == 1) CHECK(5 * cache.bytes().codes < 2 * all.bytes().codes);
        }
        CHECK(memory.live() == 0);
      }
    }
}

TEST_CASE("snapkv after an exact prompt: what it gives up is never coded, what comes later stays", "[policy]") {
  const CacheShape shape = make_shape(1, 1, 2, 16);
  const Tokens x(shape, 400, 7);
  const auto set = table_set(shape, 1);
  const CachePolicy policy = policy_from(
      R"({"policy": {"name": "snapkv", "budget": 60, "observe": 16}, "sinks": 4, "window": 32, "flush": 16})");
  std::optional<std::vector<int32_t>> kept;
  for (const int64_t block : {1, 33, 200}) {
    CountingResource memory;
    CompressedCache cache(set, policy, &memory);
    cache.expect_prompt(200);
    feed_to(cache, x, 200, block, Visibility::kExactPrefill);
    CHECK(cache.bytes().codes == 0);
    cache.end_exact_prefill();
    const auto seen = CacheView(cache).seen(0, 0);
    CHECK(seen.size() == 64);
    CHECK(std::equal(seen.end() - 16, seen.end(), up_to(200).end() - 16));
    // Coded: what is kept of [4, 164); 200 - 32 - 4 = 164 past the window, in steps of 16.
    const int64_t end = CacheView(cache).coded_end(0, Role::kKey);
    const auto coded = CacheView(cache).slot_positions(0);
    CHECK(std::equal(coded.begin(), coded.end(), std::lower_bound(seen.begin(), seen.end(), 4),
                     std::lower_bound(seen.begin(), seen.end(), end)));
    CHECK(cache.bytes().total_sequence() == memory.live());
    if (kept) CHECK(seen == *kept);
    kept = seen;
    feed_to(cache, x, 400, block);
    CHECK(CacheView(cache).seen(0, 0).size() == 264);
    CHECK(cache.bytes().total_sequence() == memory.live());
  }
}

TEST_CASE("codecs are told true positions, whatever was given up before them", "[policy]") {
  const CacheShape shape = make_shape(2, 1, 2, 16);
  const Tokens x(shape, 400, 12);
  const CachePolicy snapkv = policy_from(
      R"({"policy": {"name": "snapkv", "budget": 60, "observe": 16, "interval": 50}, "sinks": 4, "window": 64, "flush": 16})");
  for (const int heads : {1, 2})
    for (const int block : {1, 4, 16}) {
      const auto set = dummy_codec_set(shape, RopePlacement::kPre, heads, [&](const UnitShape& unit) {
        return std::make_unique<PositionDummy>(unit, block);
      });
      for (const int64_t step : {1, 33, 400}) {
        CAPTURE(heads, block, step);
        CompressedCache cache(set, snapkv);
        feed_to(cache, x, 400, step);
        cache.evict(0, 0, std::vector<int64_t>{6, 7, 8});
        const CacheView view(cache);
        bool gaps = false;
        for (size_t u = 0; u < set->units().size(); ++u) {
          const UnitShape& unit = view.unit_shape(u);
          const Matrix<float>& from = unit.role == Role::kKey ? x.k : x.v;
          const CodeBlock codes = view.fetch_codes(u);
          const Matrix<float> rows = view.decode_codes(u, 0, view.slots(u));
          const auto listed = view.slot_positions(u);
          REQUIRE(rows.rows > 16);
          for (int64_t s = 0; s < rows.rows; ++s) {
            const int64_t position = listed.empty() ? 4 + s : listed[static_cast<size_t>(s)];
            gaps = gaps || position != 4 + s;
            REQUIRE(codes.sides[1][static_cast<size_t>(s)] == static_cast<float>(position));
            for (int64_t c = 0; c < rows.cols; ++c) {
              float exact = from(position, unit.first_head * 16 + c);
              cache.policy().round_exact(&exact, 1, [](int64_t) { return ""; });
              REQUIRE(rows(s, c) == PositionDummy::moved(exact, position));
            }
          }
        }
        if (block < 16) CHECK(gaps);
      }
    }
}

TEST_CASE("rolling back under a policy: as if nothing had been seen, or refused", "[policy]") {
  const CacheShape shape = make_shape(1, 1, 2, 16);
  const Tokens x(shape, 400, 9), other(shape, 400, 10);
  const auto set = table_set(shape, 1);
  const CachePolicy snapkv = policy_from(
      R"({"policy": {"name": "snapkv", "budget": 60, "observe": 16, "interval": 100}, "sinks": 4, "window": 64, "flush": 16})");
  // Drafts at 200 + 30 are neither before the decision at 200 nor among the queries that the one at 300 asks.
  CountingResource memory, plain_memory;
  CompressedCache cache(set, snapkv, &memory), plain(set, snapkv, &plain_memory);
  feed_to(cache, x, 230, 23);
  feed_to(plain, x, 230, 23);
  feed_to(cache, other, 236, 3);
  cache.truncate(230);
  CHECK(cache.bytes().to_json() == plain.bytes().to_json());
  CHECK(memory.live() == plain_memory.live());
  feed_to(cache, x, 350, 23);
  feed_to(plain, x, 350, 23);
  for (int h = 0; h < 2; ++h) CHECK(CacheView(cache).seen(0, h) == CacheView(plain).seen(0, h));
  CHECK(CacheView(cache).fetch_codes(0).fields == CacheView(plain).fetch_codes(0).fields);
  CHECK(cache.bytes().to_json() == plain.bytes().to_json());
  CHECK_THROWS_WITH(cache.truncate(299),
                    Catch::Contains("at 300 snapkv") && Catch::Contains("roll back to 300 or later"));
  feed_to(cache, x, 390, 23);
  CHECK_THROWS_WITH(cache.truncate(387), Catch::Contains("can't be told apart"));
  CHECK_NOTHROW(cache.truncate(390));
  // Sums of all queries can't give one back.
  CompressedCache heavy(set, policy_from(R"({"policy": {"name": "h2o", "interval": 100}, "window": 64})"));
  feed_to(heavy, x, 120, 40);
  CHECK_THROWS_WITH(heavy.truncate(110), Catch::Contains("can't be told apart; roll back to 120 or later, or take a "
                                                         "policy that sums nothing (all, streaming)"));
}

namespace {

// What `explain` and `ls` show of a kind is what an empty configuration stands for.
template <class Kind>
void defaults_are_canonical(const Kind& kind) {
  const Json canonical = kind.canonical(Json::object(), "here");
  INFO(kind.describe().name);
  for (const Knob& knob : kind.knobs()) {
    INFO(knob.name);
    CHECK(knob.get() == canonical.at(knob.name));
  }
}

}  // namespace

TEST_CASE("knobs are listed with the defaults that hold", "[policy][registry]") {
  for (const Method* m : all_methods()) defaults_are_canonical(*m);
  for (const TransformKind* t : all_transforms()) defaults_are_canonical(*t);
  for (const PolicyKind* p : all_policies()) defaults_are_canonical(*p);
}
