// Policies of which tokens stay, as attention sees them.
#include "attention/plan_codec.h"
#include "attention/session_cpu.h"
#include "core/json.h"
#include "support/catch.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

double worst(const Matrix<float>& a, const Matrix<float>& b) {
  REQUIRE(a.storage.size() == b.storage.size());
  double most = 0;
  for (size_t i = 0; i < a.storage.size(); ++i) most = std::max(most, std::abs(double{a.storage[i]} - b.storage[i]));
  return most;
}

std::shared_ptr<const CodecSet> tables(const CacheShape& shape, RopePlacement rope) {
  return make_set(shape, 1, [&](Role role, int channels) {
    DecodePlan p = empty_plan(channels);
    if (role == Role::kKey) p.rope = rope;
    add_table(p, 8, 4);
    return std::make_shared<PlanCodec>(p);
  });
}

}  // namespace

TEST_CASE("streaming: sinks and the window, nothing between, as if the rest were evicted", "[policy][evict]") {
  const CacheShape shape = make_shape(1, 3, 2, 64);
  const Tokens x(shape, 500, 17);
  const CachePolicy policy =
      CachePolicy::from_json(parse_json(R"({"policy": "streaming", "sinks": 4, "window": 96, "flush": 32})", "test"));
  REQUIRE(policy.drops);

  // The same from an exact cache: before each step the tokens between are evicted by name.
  Matrix<float> expected(500, shape.q_heads * 64);
  {
    const auto reference = make_attention_backend("reference");
    CompressedCache cache(shape, CachePolicy::exact());
    KvSessionCpu session(cache, *reference);
    for (int64_t t = 0; t < 500; ++t) {
      std::vector<int64_t> gone;
      for (int64_t p = 4; p < policy.coded_end(Role::kKey, t); ++p) gone.push_back(p);
      for (int h = 0; h < 2; ++h) cache.evict(0, h, gone);
      session.begin_block(1);
      session.attend(0, x.q.view().slice_rows(t, 1), x.k.view().slice_rows(t, 1), x.v.view().slice_rows(t, 1),
                     MutMatrix(expected).slice_rows(t, 1));
      session.end_block();
    }
  }
  for (const RopePlacement rope : {RopePlacement::kPost, RopePlacement::kPre})
    for (const char* name : {"reference", "cpu-reconstruct", "cpu-table", "auto"}) {
      if (rope == RopePlacement::kPre && std::string(name) == "cpu-table") continue;
      CAPTURE(name, static_cast<int>(rope));
      const auto set = tables(shape, rope);
      const auto backend = make_attention_backend(name);
      const Matrix<float> whole = replay(set, policy, *backend, x, 500).out;
      CHECK(worst(whole, expected) < 2e-3);  // keys are rounded to f16 before or after RoPE
      if (rope == RopePlacement::kPost) CHECK(worst(whole, expected) < 2e-5);
      for (const int64_t block : {1, 37, 128})
        CHECK((replay(set, policy, *backend, x, block).out.storage == whole.storage));
    }
}

TEST_CASE("streaming: bytes stay where they are however long the text", "[policy][ledger]") {
  const CacheShape shape = make_shape(2, 1, 2, 16);
  const auto set = tables(shape, RopePlacement::kPost);
  const CachePolicy policy = CachePolicy::from_json(
      parse_json(R"({"policy": {"name": "streaming"}, "sinks": 4, "window": 64, "flush": 32})", "test"));
  const Tokens x(shape, 1000, 19);
  for (const bool with_codecs : {true, false}) {
    CountingResource memory;
    CompressedCache cache =
        with_codecs ? CompressedCache(set, policy, &memory) : CompressedCache(shape, policy, &memory);
    int64_t before = 0;
    for (int64_t t = 0; t < 1000; t += 40) {
      cache.begin_block(40);
      for (int layer = 0; layer < 2; ++layer)
        cache.append(layer, x.k.view().slice_rows(t, 40), x.v.view().slice_rows(t, 40));
      cache.end_block();
      const ByteLedger b = cache.bytes();
      CHECK(b.total_sequence() == memory.live());
      CHECK(b.codes == 0);
      if (with_codecs) CHECK(b.to_json() == ledger_at(*set, policy, cache.length()).to_json());
      if (t == 480) before = b.total_sequence();
      if (t > 480) CHECK(b.total_sequence() <= before + 2 * 2 * 2 * 32 * 2 * 16 * 2);
    }
    cache.truncate(cache.length() - 5);
    CHECK(cache.bytes().total_sequence() == memory.live());
    CHECK_THROWS_AS(cache.truncate(500), Error);
    CHECK_THROWS_WITH(cache.begin_block(10, Visibility::kAllCoded), Catch::Contains("fake-quant"));
  }
}

TEST_CASE("h2o and snapkv keep what a brute reading of their formulas keeps, on every path", "[policy][evict]") {
  const CacheShape shape = make_shape(1, 3, 2, 64);
  const Tokens x(shape, 260, 23);
  struct Seen final : AttentionTap {
    void on_probabilities(int, int q_head, int64_t, ConstMatrix p) override {
      std::vector<double>& sum = sums[static_cast<size_t>(q_head / 3)];
      sum.resize(static_cast<size_t>(p.cols));
      for (int64_t i = 0; i < p.rows; ++i)
        for (int64_t t = 0; t < p.cols; ++t) sum[static_cast<size_t>(t)] += p(i, t);
    }
    std::vector<double> sums[2];
  };
  for (const bool snapkv : {false, true})
    for (const int heads : {1, 2})
      for (const RopePlacement rope : {RopePlacement::kPost, RopePlacement::kPre}) {
        const CachePolicy policy = CachePolicy::from_json(parse_json(
            snapkv ? R"({"policy": {"name": "snapkv", "budget": 60, "observe": 16, "kernel": 1, "interval": 80},
                         "sinks": 4, "window": 32, "flush": 16})"
                   : R"({"policy": {"name": "h2o", "heavy": 40, "recent": 20, "interval": 60},
                         "sinks": 4, "window": 32, "flush": 16})",
            "test"));
        const auto set = make_set(shape, heads, [&](Role role, int channels) {
          DecodePlan p = empty_plan(channels);
          if (role == Role::kKey) p.rope = rope;
          add_table(p, 8, 4);
          return std::make_shared<PlanCodec>(p);
        });
        const auto run = [&](const char* name, int64_t block, AttentionTap* tap, auto&& after) {
          CountingResource memory;
          const auto backend = make_attention_backend(name);
          CompressedCache cache(set, policy, &memory);
          KvSessionCpu session(cache, *backend);
          session.set_tap(tap);
          Matrix<float> out(260, x.q.cols);
          for (int64_t t = 0, n = 0; t < 260; t += n) {
            n = std::min({block, 260 - t, cache.block_limit()});
            session.begin_block(n);
            session.attend(0, x.q.view().slice_rows(t, n), x.k.view().slice_rows(t, n), x.v.view().slice_rows(t, n),
                           MutMatrix(out).slice_rows(t, n));
            session.end_block();
            REQUIRE(cache.bytes().total_sequence() == memory.live());
            after(CacheView(cache));
          }
          return out;
        };
        // Token by token, from written-out probabilities.
        Seen tap;
        std::vector<bool> gone[2] = {std::vector<bool>(260), std::vector<bool>(260)};
        std::vector<std::vector<int32_t>> kept;  // at each decision, by head
        const int64_t interval = snapkv ? 80 : 60, protect = snapkv ? 16 : 20, most = snapkv ? 60 - 16 : 40;
        const Matrix<float> reference = run("reference", 1, &tap, [&](const CacheView& cache) {
          const int64_t length = cache.length();
          if (length % interval == 0)
            for (size_t h = 0; h < 2; ++h) {
              std::vector<std::pair<double, int64_t>> old;
              for (int64_t t = 4; t < length - protect; ++t)
                if (!gone[h][static_cast<size_t>(t)]) old.emplace_back(-tap.sums[h][static_cast<size_t>(t)], t);
              std::sort(old.begin(), old.end());
              for (size_t i = static_cast<size_t>(most); i < old.size(); ++i)
                gone[h][static_cast<size_t>(old[i].second)] = true;
              std::vector<int32_t> seen;
              for (int32_t t = 0; t < length; ++t)
                if (!gone[h][static_cast<size_t>(t)]) seen.push_back(t);
              CHECK(cache.seen(0, static_cast<int>(h)) == seen);
              kept.push_back(std::move(seen));
            }
          if (snapkv && length % interval == interval - 16) tap.sums[0].clear(), tap.sums[1].clear();
        });
        REQUIRE(kept.size() >= 6);
        CHECK(kept[4] != kept[5]);
        for (const char* name : {"reference", "cpu-reconstruct", "cpu-table", "cpu-table8", "auto"}) {
          if (rope == RopePlacement::kPre && std::string(name).starts_with("cpu-table")) continue;
          CAPTURE(snapkv, heads, static_cast<int>(rope), name);
          std::vector<std::vector<int32_t>> mine;
          const auto note = [&](const CacheView& cache) {
            if (cache.length() % interval == 0)
              for (int h = 0; h < 2; ++h) mine.push_back(cache.seen(0, h));
          };
          const Matrix<float> whole = run(name, 260, nullptr, note);
          // Logits by table are a little off, and so may be who is last within the budget.
          if (mine == kept) CHECK(worst(whole, reference) < (std::string(name).starts_with("cpu-table") ? 0.1 : 2e-5));
          if (!std::string(name).starts_with("cpu-table")) CHECK(mine == kept);
          if (std::string(name) != "auto")
            for (const int64_t block : {1, 7, 64}) {
              const auto before = mine;
              mine.clear();
              CHECK((run(name, block, nullptr, note).storage == whole.storage));
              CHECK(mine == before);
            }
        }
      }
}

TEST_CASE("behind the codec exact a policy's survivors are exact", "[policy]") {
  // The same as an exact cache from which the tokens are taken by name.
  const CacheShape shape = make_shape(1, 3, 2, 64);
  const Tokens x(shape, 300, 29);
  const auto set = exact_codec_set(shape);
  const CachePolicy policy = CachePolicy::from_json(parse_json(
      R"({"policy": {"name": "h2o", "heavy": 40, "recent": 20, "interval": 50}, "sinks": 4, "window": 32, "flush": 16})",
      "test"));
  const auto backend = make_attention_backend("cpu-reconstruct");
  CompressedCache cache(set, policy), exact(shape, CachePolicy::exact());
  KvSessionCpu session(cache, *backend), beside(exact, *backend);
  for (int64_t t = 0; t < 300; t += 50) {
    Matrix<float> out(50, x.q.cols), expected(50, x.q.cols);
    for (KvSession* s : {&session, &beside}) {
      s->begin_block(50);
      s->attend(0, x.q.view().slice_rows(t, 50), x.k.view().slice_rows(t, 50), x.v.view().slice_rows(t, 50),
                s == &session ? out : expected);
      s->end_block();
    }
    CHECK(worst(out, expected) == 0);
    for (int h = 0; h < 2; ++h) {
      std::vector<int64_t> gone;
      for (int64_t p = 0; p < t + 50; ++p)
        if (CacheView(cache).evicted(0, h, p)) gone.push_back(p);
      exact.evict(0, h, gone);
    }
  }
  CHECK(CacheView(cache).seen(0, 0).size() == 64);
  CHECK(cache.bytes().side < 300 * 2 * 64 * 2);
}

TEST_CASE("policies are configured, canonical, and refused where they don't fit", "[policy]") {
  const auto canonical = [](const char* text) { return canonical_cache_config(parse_json(text, "test")); };
  CHECK(canonical(R"({"policy": "streaming"})") == canonical(R"({"policy": {"name": "streaming"}, "window": 128})"));
  CHECK(canonical(R"({"policy": "all"})") == canonical("{}"));
  CHECK(canonical(R"({"policy": "streaming"})") != canonical("{}"));
  CHECK(canonical_cache_config(canonical(R"({"policy": "streaming"})")) == canonical(R"({"policy": "streaming"})"));
  const auto message = [](const char* text) {
    try {
      CachePolicy::from_json(parse_json(text, "test"));
    } catch (const Error& e) {
      CHECK(e.kind() == ErrorKind::kUsage);
      return std::string(e.what());
    }
    return std::string("accepted");
  };
  CHECK_THAT(message(R"({"policy": "steaming"})"), Catch::Contains("did you mean 'streaming'"));
  CHECK_THAT(message(R"({"policy": 3})"),
             Catch::Contains("cache.policy: expected a name, or a map with `name`, found 3"));
  CHECK_THAT(message(R"({"policy": {"nome": "streaming"}})"), Catch::Contains("cache.policy"));
  CHECK_THAT(message(R"({"policy": {"name": "streaming", "budget": 3}})"), Catch::Contains("cache.policy.budget"));
  CHECK_THAT(message(R"({"policy": "streaming", "rule": "none"})"), Catch::Contains("rule 'none'"));
  CHECK_THAT(message(R"({"policy": "streaming", "rule": "kivi"})"), Catch::Contains("one rule"));
  CHECK_THAT(message(R"({"policy": "streaming", "window": 0})"), Catch::Contains("cache.window"));
}
