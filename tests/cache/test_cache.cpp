#include <fmt/format.h>

#include "cache/cache_support.h"
#include "cache/view.h"
#include "codec/codec_set.h"
#include "core/json.h"
#include "core/rng.h"
#include "support/catch.h"
#include "support/dummy_codecs.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

std::shared_ptr<const CodecSet> pq_set(const CacheShape& shape, int heads, int bits = 8, int block = 1,
                                       int overlay = 0) {
  return make_set(shape, heads, [&](Role role, int channels) {
    DecodePlan p = empty_plan(channels, block);
    if (role == Role::kKey)
      add_table(p, bits, 4);
    else
      add_levels(p, bits > 8 ? 8 : bits, 8, block, block == 1);
    return std::make_shared<PlanCodec>(p, overlay);
  });
}

}  // namespace

TEST_CASE("The ledger equals the memory resource and the formula at every length", "[ledger]") {
  const CacheShape shape = make_shape(2, 2, 2, 16);
  const Tokens x(shape, 700, 1);
  const std::vector<CachePolicy> policies = {policy_of(4, {128, 64}, {128, 64}),
                                             policy_of(0, {1, 64}, {65, 64}),
                                             policy_of(3, {0, 64}, {10, 64}),
                                             policy_of(130, {32, 64}, {32, 64}),
                                             with_prompt(policy_of(4, {128, 64}, {32, 64}), 250),
                                             with_prompt(policy_of(4, {128, 64}, {0, 64}), 250, false),
                                             with_prompt(policy_of(0, {1, 64, 224}, {1, 64, 224}), 224),
                                             with_prompt(policy_of(4, {1, 64, 260}, {1, 64, 260}), 260, false)};
  for (const int heads : {1, 2})
    for (const int bits : {2, 5, 8, 10})
      for (const int block : {1, 32}) {
        const auto set = pq_set(shape, heads, bits, block);
        for (const CachePolicy& policy : policies)
          for (const int64_t step : {1, 29, 200}) {
            if (step == 1 && (bits != 5 || heads != 2)) continue;
            CountingResource memory;
            {
              CompressedCache cache(set, policy, &memory);
              CHECK(cache.bytes().total_sequence() == memory.live());
              for (int64_t t = 0; t < 650; t += step) {
                feed(cache, x, t, std::min<int64_t>(step, 650 - t));
                if (cache.bytes().total_sequence() != memory.live() ||
                    !same(cache.bytes(), ledger_at(*set, policy, cache.length()))) {
                  FAIL("length " << cache.length() << ": " << cache.bytes().to_json() << " live " << memory.live()
                                 << " formula " << ledger_at(*set, policy, cache.length()).to_json());
                }
              }
            }
            CHECK(memory.live() == 0);
          }
      }
}

TEST_CASE("Ledger kinds follow the layout", "[ledger]") {
  // 2 layers x 1 head x 64: keys 16 codes of 8 bits a token, values in f16 exact sides.
  const CacheShape shape = make_shape(2, 1, 1, 64);
  const auto set = make_set(shape, 1, [](Role role, int channels) {
    DecodePlan p = empty_plan(channels);
    if (role == Role::kKey)
      add_table(p, 8, 4);
    else
      add_dense(p, [] {
        std::vector<int32_t> c;
        for (int i = 0; i < 64; ++i) c.push_back(i);
        return c;
      }());
    return std::make_shared<PlanCodec>(p);
  });
  CompressedCache cache(set, policy_of(4, {128, 64}, {128, 64}));
  feed(cache, Tokens(shape, 4 + 192 + 127, 2), 0, 4 + 192 + 127);
  const ByteLedger b = cache.bytes();
  CHECK(b.codes == 2 * 192 * 16);
  CHECK(b.side == 2 * 192 * 64 * 2);
  CHECK(b.sinks == 2 * 2 * 4 * 64 * 2);
  CHECK(b.window == 2 * 2 * 127 * 64 * 2);
  CHECK(b.padding == 2 * 2 * 1 * 64 * 2);  // 127 rows in 4 chunks of 32
  CHECK(b.overlay == 0);
  CHECK(b.codebooks == set->constant_bytes());
}

TEST_CASE("Flush rules of a window and of KIVI", "[policy]") {
  const FlushRule window{128, 64}, keys{1, 128}, values{129, 1};
  CHECK(window.coded_end(4, 4 + 190) == 4);
  CHECK(window.coded_end(4, 4 + 191) == 4 + 64);
  // KIVI: |tail| < R after the step, the newest R values exact besides the step's own.
  for (int64_t i = 0; i < 700; ++i) {
    CHECK(keys.coded_end(0, i) == i / 128 * 128);
    CHECK(values.coded_end(0, i) == std::max<int64_t>(0, i - 128));
  }
  const CacheShape shape = make_shape(1, 1, 1, 16);
  CompressedCache cache(pq_set(shape, 1), policy_of(0, keys, values));
  const Tokens x(shape, 300, 3);
  for (int64_t t = 0; t < 300; ++t) {
    feed(cache, x, t, 1);
    const int64_t k = CacheView(cache).coded_end(0, Role::kKey), v = CacheView(cache).coded_end(0, Role::kValue);
    REQUIRE(cache.length() - k < 128);
    REQUIRE(k % 128 == 0);
    REQUIRE(cache.length() - v == std::min<int64_t>(cache.length(), 128));
  }
}

TEST_CASE("A prompt that is said to end: nothing is coded before, and nothing of what follows where that stays exact",
          "[policy]") {
  const CacheShape shape = make_shape(1, 1, 1, 16);
  const Tokens x(shape, 300, 3);
  for (const bool codes_generated : {true, false})
    for (const FlushRule& rule : {FlushRule{32, 1}, {1, 16}, {0, 1}, {64, 32}})
      for (const int64_t block : {1, 23, 300}) {
        CAPTURE(codes_generated, rule.window, rule.flush, block);
        const CachePolicy policy = with_prompt(policy_of(4, rule, rule), 100, codes_generated);
        CompressedCache cache(pq_set(shape, 1), policy);
        for (int64_t t = 0; t < 300; t += block) {
          feed(cache, x, t, std::min(block, 300 - t));
          for (int64_t p = t; p < cache.length(); ++p) {
            const int64_t expected = p < 99 ? std::min<int64_t>(4, p + 1) : rule.coded_end(4, codes_generated ? p : 99);
            CHECK(cache.policy().coded_end(Role::kKey, p) == expected);
          }
          const int64_t coded = CacheView(cache).coded_end(0, Role::kKey), n = cache.length();
          CHECK(coded == (n < 100 ? 4 : codes_generated ? rule.coded_among(4, n) : rule.coded_end(4, 99)));
        }
      }
}

TEST_CASE("Policies from configurations", "[policy]") {
  const CachePolicy p =
      CachePolicy::from_json(parse_json(R"({"window": 96, "k": {"flush": 32}, "exact_dtype": "bf16"})", "test"));
  CHECK(p.sinks == 4);
  CHECK(p.k.window == 96);
  CHECK(p.k.flush == 32);
  CHECK(p.v.flush == 64);
  CHECK(p.exact_dtype == DType::kBF16);
  const CachePolicy kivi =
      CachePolicy::from_json(parse_json(R"({"rule": "kivi", "residual": 32, "sinks": 0})", "test"));
  CHECK(kivi.k.window == 1);
  CHECK(kivi.k.flush == 32);
  CHECK(kivi.v.window == 33);
  CHECK(kivi.v.flush == 1);
  CHECK_FALSE(CachePolicy::from_json(parse_json(R"({"rule": "none"})", "test")).codes);
  // Canonical: what is written out or left to the default is one identity.
  CHECK(canonical_json(canonical_cache_config(Json())) ==
        canonical_json(
            canonical_cache_config(parse_json(R"({"sinks": 4.0, "window": 128, "v": {"flush": 64}})", "test"))));
  const Json once = canonical_cache_config(parse_json(R"({"rule": "kivi"})", "test"));
  CHECK(canonical_json(canonical_cache_config(once)) == canonical_json(once));
  const auto message = [](const char* text) {
    try {
      CachePolicy::from_json(parse_json(text, "test"));
    } catch (const Error& e) {
      CHECK(e.kind() == ErrorKind::kUsage);
      return std::string(e.what());
    }
    return std::string("accepted");
  };
  const CachePolicy prompt = CachePolicy::from_json(parse_json(R"({"prompt": 512, "generated": "exact"})", "test"));
  CHECK(prompt.prompt == 512);
  CHECK_FALSE(prompt.codes_generated);
  CHECK_FALSE(canonical_cache_config(Json()).contains("prompt"));
  CHECK(message(R"({"generated": "exact"})").find("cache.generated: exact needs cache.prompt") != std::string::npos);
  CHECK(message(R"({"prompt": 9, "rule": "none"})").find("cache.prompt: rule none codes nothing") != std::string::npos);
  CHECK(message(R"({"prompt": 9, "policy": "streaming"})").find("cache.prompt: streaming codes nothing") !=
        std::string::npos);
  CHECK(message(R"({"windw": 3})").find("did you mean 'window'") != std::string::npos);
  CHECK(message(R"({"k": {"rule": "kivy"}})").find("did you mean 'kivi'") != std::string::npos);
  CHECK(message(R"({"flush": 0})").find("cache.flush: expected an integer in [1, ") != std::string::npos);
  CHECK(message(R"({"sinks": 1.5})").find("cache.sinks: expected an integer in [0, ") != std::string::npos);
  CHECK(message(R"({"sinks": 99999999999})").find("cache.sinks") != std::string::npos);
  CHECK(message(R"({"exact_dtype": "fp16"})").find("did you mean 'f16'") != std::string::npos);
  CHECK(message(R"({"k": {"rule": "none"}})").find("both roles") != std::string::npos);
  CHECK(message(R"([1])").find("cache: expected a map") != std::string::npos);
}

TEST_CASE("A flush must hold whole codec blocks", "[policy]") {
  const CacheShape shape = make_shape(1, 1, 1, 16);
  try {
    CompressedCache cache(pq_set(shape, 1, 4, 32), policy_of(0, {128, 48}, {128, 32}));
    FAIL("accepted");
  } catch (const Error& e) {
    CHECK(e.kind() == ErrorKind::kUsage);
    CHECK(std::string(e.what()).find("cache.k: flush 48 is not a multiple of the 32 tokens") != std::string::npos);
  }
}

TEST_CASE("Tokens are coded once, from the stored exact value, whatever the block", "[cache]") {
  const CacheShape shape = make_shape(1, 1, 2, 16);
  const auto set = pq_set(shape, 2, 8, 32);
  const Tokens x(shape, 400, 5);
  const auto codes = [&](int64_t step, Visibility visibility) {
    CompressedCache cache(set, policy_of(4, {64, 32}, {64, 32}));
    for (int64_t t = 0; t < 400; t += step) feed(cache, x, t, std::min<int64_t>(step, 400 - t), visibility);
    cache.end_exact_prefill();
    std::vector<uint16_t> all;
    for (size_t u = 0; u < 2; ++u)
      for (const auto& f : CacheView(cache).fetch_codes(u).fields) all.insert(all.end(), f.begin(), f.end());
    return all;
  };
  const auto steps = codes(1, Visibility::kReplay);
  CHECK(steps.size() == 10 * 32 * (8 + 32));
  CHECK((codes(57, Visibility::kReplay) == steps));
  CHECK((codes(400, Visibility::kReplay) == steps));
  CHECK((codes(400, Visibility::kExactPrefill) == steps));
}

TEST_CASE("Rolling back inside the window, and no further", "[cache]") {
  const CacheShape shape = make_shape(2, 1, 1, 16);
  const auto set = pq_set(shape, 1);
  const Tokens x(shape, 300, 7);
  const CachePolicy policy = policy_of(4, {64, 32}, {64, 32});
  CountingResource memory, other_memory;
  CompressedCache cache(set, policy, &memory), straight(set, policy, &other_memory);
  feed(cache, x, 0, 200);
  feed(straight, x, 0, 200);
  feed(cache, x, 210, 20);  // drafted tokens that are taken back
  cache.truncate(200);
  CHECK(cache.length() == 200);
  CHECK(cache.bytes().total_sequence() == memory.live());
  feed(cache, x, 200, 100);
  feed(straight, x, 200, 100);
  CHECK(same(cache.bytes(), straight.bytes()));
  for (size_t u = 0; u < set->units().size(); ++u)
    CHECK((CacheView(cache).fetch_codes(u).fields == CacheView(straight).fetch_codes(u).fields));
  CHECK_THROWS_AS(cache.truncate(100), Error);
}

TEST_CASE("a value that leaves the exact type is refused by name, not stored as infinity", "[cache]") {
  for (const DType type : {DType::kF16, DType::kBF16, DType::kF32}) {
    std::vector<float> x = {1.0f / 3, -65504.0f};
    const CachePolicy policy = CachePolicy::exact(type);
    std::vector<float> rounded = x;
    round_to(type, rounded.data(), 2);
    const auto place = [](int64_t i) { return fmt::format("value {}", i); };
    policy.round_exact(x.data(), 2, place);
    CHECK(x == rounded);
    x[1] = 65520.0f;  // the first that f16 rounds to infinity
    if (type == DType::kF16)
      CHECK_THROWS_WITH(policy.round_exact(x.data(), 2, place),
                        Catch::Contains("value 1: 65520 leaves f16") && Catch::Contains("exact_dtype"));
    else
      CHECK_NOTHROW(policy.round_exact(x.data(), 2, place));
  }
}

TEST_CASE("a cache refuses what its exact type cannot hold, as a sweep does", "[cache]") {
  const CacheShape shape = make_shape(1, 1, 2, 16);
  for (const Role role : {Role::kKey, Role::kValue})
    for (const float bad : {2e5f, -1e30f, INFINITY, NAN}) {
      CAPTURE(role_name(role), bad);
      CachePolicy policy = policy_of(4, {32, 16}, {32, 16});
      Tokens x(shape, 40, 15);
      (role == Role::kKey ? x.k : x.v)(33, 20) = bad;
      for (const bool codes : {true, false}) {
        policy.codes = codes;
        CompressedCache cache = codes ? CompressedCache(pq_set(shape, 1), policy) : CompressedCache(shape, policy);
        CHECK_THROWS_WITH(feed(cache, x, 0, 40),
                          Catch::Contains("leaves f16") &&
                              Catch::Contains(fmt::format("layer 0, {} of KV head 1, token 33, channel 4: ",
                                                          role == Role::kKey ? "key" : "value")));
      }
      policy.exact_dtype = DType::kBF16;
      CompressedCache wider(pq_set(shape, 1), policy);
      if (std::isfinite(bad))
        CHECK_NOTHROW(feed(wider, x, 0, 40));
      else
        CHECK_THROWS_WITH(feed(wider, x, 0, 40), Catch::Contains("leaves bf16"));
    }
}

TEST_CASE("Overlays are stored, counted and found", "[cache]") {
  const CacheShape shape = make_shape(1, 1, 1, 16);
  const auto set = pq_set(shape, 1, 8, 1, 4);
  const Tokens x(shape, 300, 9);
  CountingResource memory;
  CompressedCache cache(set, policy_of(4, {32, 16}, {32, 16}), &memory);
  for (int64_t t = 0; t < 300; t += 20) {
    feed(cache, x, t, 20);
    CHECK(cache.bytes().total_sequence() == memory.live());
  }
  const CacheView view(cache);
  const CodeBlock codes = view.fetch_codes(0);
  CHECK(codes.overlay.size() > 30);
  CHECK(std::is_sorted(codes.overlay.begin(), codes.overlay.end(),
                       [](const auto& a, const auto& b) { return a.token < b.token; }));
  // 4 bytes an exception, and 4 bytes a coded token that say where its own begin.
  CHECK(cache.bytes().overlay == 4 * static_cast<int64_t>(codes.overlay.size() + view.fetch_codes(1).overlay.size()) +
                                     4 * (view.slots(0) + view.slots(1)));
}

TEST_CASE("What stays of a body lies together, with the codes that it had", "[evict]") {
  const CacheShape shape = make_shape(2, 1, 4, 16);
  const Tokens x(shape, 700, 17);
  for (const int heads : {1, 2, 4})
    for (const int block : {1, 32})
      for (const int overlay : {0, 3}) {
        if (block > 1 && overlay > 0) continue;
        CAPTURE(heads, block, overlay);
        const auto set = pq_set(shape, heads, 5, block, overlay);
        const CachePolicy policy = policy_of(4, {64, 64}, {128, 64});
        CountingResource memory;
        CompressedCache cache(set, policy, &memory), whole(set, policy);
        Rng rng(23);
        for (int64_t t = 0; t < 700; t += 70) {
          feed(cache, x, t, 70);
          feed(whole, x, t, 70);
          // Coded and exact tokens, other ones by head, some of them again; runs as long as a block or not.
          for (int layer = 0; layer < 2; ++layer)
            for (int head = 0; head < 4; ++head) {
              std::vector<int64_t> gone;
              const auto first = static_cast<int64_t>(rng.below(static_cast<uint64_t>(cache.length() - 60)));
              for (int64_t i = 0; i < 60; i += head == 3 ? 2 : 1) gone.push_back(first + i);
              cache.evict(layer, head, gone);
              if (head == 1)
                for (int h = 0; h < 4; ++h) cache.evict(layer, h, gone);
            }
          REQUIRE(cache.bytes().total_sequence() == memory.live());
          int64_t codes = 0, side = 0;
          for (int layer = 0; layer < 2; ++layer)
            for (const size_t u : CacheView(cache).layer_units(layer)) {
              const CacheView view(cache), all(whole);
              const UnitShape& unit = view.unit_shape(u);
              // Blocks that some head sees something of.
              std::vector<int64_t> kept;
              for (int64_t b = 4; b < view.coded_end(layer, unit.role); b += block) {
                bool seen = false;
                for (int h = unit.first_head; h < unit.first_head + unit.heads; ++h)
                  for (int64_t i = b; i < b + block; ++i) seen = seen || !view.evicted(layer, h, i);
                for (int64_t i = b; seen && i < b + block; ++i) kept.push_back(i);
              }
              const auto listed = view.slot_positions(u);
              REQUIRE(std::equal(listed.begin(), listed.end(), kept.begin(), kept.end()));
              const CodeBlock held = view.fetch_codes(u), before = all.fetch_codes(u);
              REQUIRE(held.blocks * block == static_cast<int64_t>(kept.size()));
              const CodeLayout& layout = view.form(u).plan.layout;
              const auto rows = [&](const auto& mine, const auto& theirs, int slots, bool per_token) {
                const int64_t each = per_token ? 1 : block;
                for (int64_t i = 0; i < static_cast<int64_t>(kept.size()); i += each)
                  for (int s = 0; s < slots; ++s)
                    REQUIRE(mine[static_cast<size_t>(i / each * slots + s)] ==
                            theirs[static_cast<size_t>((kept[static_cast<size_t>(i)] - 4) / each * slots + s)]);
              };
              for (size_t f = 0; f < layout.fields.size(); ++f)
                rows(held.fields[f], before.fields[f], layout.fields[f].slots, layout.fields[f].per_token);
              for (size_t f = 0; f < layout.sides.size(); ++f)
                rows(held.sides[f], before.sides[f], layout.sides[f].slots, layout.sides[f].per_token);
              std::vector<OverlayEntry> expected;
              for (const OverlayEntry& e : before.overlay)
                if (const auto at = std::find(kept.begin(), kept.end(), e.token + 4); at != kept.end())
                  expected.push_back({static_cast<int32_t>(at - kept.begin()), e.channel, e.value, e.add});
              REQUIRE(held.overlay.size() == expected.size());
              for (size_t i = 0; i < expected.size(); ++i) {
                REQUIRE(held.overlay[i].token == expected[i].token);
                REQUIRE(held.overlay[i].value == expected[i].value);
              }
              const PageLayout& pages = *view.form(u).pages;
              codes += pages.code_bytes(static_cast<int64_t>(kept.size()));
              side += pages.side_bytes(static_cast<int64_t>(kept.size()));
            }
          REQUIRE(cache.bytes().codes == codes);
          REQUIRE(cache.bytes().side == side);
          // Less than a page of each unit, and less than a chunk of each role, holds nothing.
          int64_t room = 0;
          for (int layer = 0; layer < 2; ++layer)
            for (const size_t u : CacheView(cache).layer_units(layer)) room += CacheView(cache).form(u).pages->bytes();
          REQUIRE(cache.bytes().padding < room + 4 * kChunkTokens * 4 * 16 * 2 + cache.bytes().overlay + 64 * 8);
        }
        REQUIRE(cache.bytes().codes < whole.bytes().codes);
      }
}

TEST_CASE("Rolling back below an evicted token: its successor is seen, older ones stay lost", "[evict]") {
  const CacheShape shape = make_shape(2, 1, 2, 16);
  const Tokens draft(shape, 400, 17), x(shape, 400, 18);
  const CachePolicy policy = policy_of(4, {32, 16}, {32, 16});
  for (const int heads : {1, 2}) {
    CAPTURE(heads);
    const auto set = pq_set(shape, heads);
    CountingResource memory, other_memory;
    CompressedCache cache(set, policy, &memory), straight(set, policy, &other_memory);
    for (CompressedCache* c : {&cache, &straight}) {
      feed(*c, x, 0, 290);
      c->evict(0, 1, std::vector<int64_t>{150, 280});  // coded, and still exact
    }
    feed(cache, draft, 290, 10);
    cache.evict(0, 1, std::vector<int64_t>{150, 289, 290, 295});
    straight.evict(0, 1, std::vector<int64_t>{289});
    cache.truncate(290);
    for (const int64_t t : {150, 280, 289}) CHECK(CacheView(cache).evicted(0, 1, t));
    for (const int64_t t : {290, 295}) CHECK_FALSE(CacheView(cache).evicted(0, 1, t));
    CHECK(cache.bytes().total_sequence() == memory.live());
    for (CompressedCache* c : {&cache, &straight}) feed(*c, x, 290, 110);
    CHECK(CacheView(cache).seen(0, 1) == CacheView(straight).seen(0, 1));
    CHECK(CacheView(cache).seen(0, 0).size() == 400);
    CHECK(same(cache.bytes(), straight.bytes()));
    CHECK(cache.bytes().total_sequence() == memory.live());
    for (size_t u = 0; u < set->units().size(); ++u) {
      const CacheView view(cache), other(straight);
      CHECK((view.fetch_codes(u).fields == other.fetch_codes(u).fields));
      CHECK(std::ranges::equal(view.slot_positions(u), other.slot_positions(u)));
    }
  }
}

TEST_CASE("Evicted pages are freed when every head of the unit let go", "[evict]") {
  const CacheShape shape = make_shape(1, 1, 2, 16);
  const auto set = pq_set(shape, 2);
  const Tokens x(shape, 300, 13);
  CountingResource memory;
  CompressedCache cache(set, policy_of(4, {32, 16}, {32, 16}), &memory);
  feed(cache, x, 0, 300);
  std::vector<int64_t> page;
  for (int64_t t = 0; t < 64; ++t) page.push_back(4 + 64 + t);
  const int64_t before = memory.live();
  cache.evict(0, 0, page);
  CHECK(memory.live() > before);  // the other head still needs the page; the set itself costs
  CHECK(cache.bytes().total_sequence() == memory.live());
  cache.evict(0, 1, page);
  // A page of each role goes; the positions of the 192 slots that stay are listed.
  CHECK(memory.live() < before - 64 * (4 * 2 + 16 * 2) + 2 * 192 * 4 + 2 * 64);
  CHECK(cache.bytes().total_sequence() == memory.live());
  CHECK(CacheView(cache).evicted(0, 1, 100));
  CHECK_FALSE(CacheView(cache).evicted(0, 1, 290));
}

TEST_CASE("Books that a term turns by 90 degrees are turned once, for all heads of a unit and all that read them",
          "[ledger]") {
  UnitShape unit;
  unit.head_dim = 16;
  unit.heads = 4;
  const TableDummy codec(unit, {.width = 16, .bits = 10, .map = false, .rotate_last = true});
  const auto pages = std::make_shared<PageLayout>(codec.layout());
  const CodedForm form(codec, unit, PlanQuery{}, pages), again(codec, unit, PlanQuery{}, pages, &form);
  const TableDummy plain(unit, {.width = 16, .bits = 1, .map = false});
  const CodedForm other(plain, unit, PlanQuery{}, std::make_shared<PageLayout>(plain.layout()));
  constexpr int64_t kBooks = 2 * 1024 * 16 * 4;
  CHECK(form.bytes(other) > 2 * kBooks);
  CHECK(form.bytes(other) < 3 * kBooks);
  CHECK(again.bytes(form) < kBooks / 2);
}
