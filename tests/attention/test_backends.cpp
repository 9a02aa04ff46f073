// Every backend against the double reference, blocks against steps, threads against one.
#include <algorithm>

#include "attention/plan_cases.h"
#include "attention/scan_cpu.h"
#include "attention/session_cpu.h"
#include "core/thread_pool.h"
#include "support/catch.h"

using namespace vqkv;
using namespace vqkv::test;

TEST_CASE("cpu-reconstruct equals the double reference on every form of plan", "[backends]") {
  const auto reference = make_attention_backend("reference"), fast = make_attention_backend("cpu-reconstruct");
  for (const Case& c : cases()) {
    for (const int heads : {1, 2}) {
      CAPTURE(c.name, heads);
      const CacheShape shape = make_shape(1, 3, 2, 64);
      const auto set = set_of(c, shape, heads);
      const Tokens x(shape, 230, 21);
      const CachePolicy policy = policy_of(4, {40, 32}, {33, 32});
      const Replay want = replay(set, policy, *reference, x, 23), got = replay(set, policy, *fast, x, 23);
      CHECK(worst_difference(want.out, got.out) < tolerance(8, 64));
      CHECK(want.coded_share() == Approx(got.coded_share()).epsilon(1e-5));
      CHECK(want.coded_share() > 0.2);
    }
  }
}

TEST_CASE("Keys before and after RoPE carry the attention factor", "[backends]") {
  const auto reference = make_attention_backend("reference"), fast = make_attention_backend("cpu-reconstruct"),
             table = make_attention_backend("cpu-table");
  const CachePolicy policy = policy_of(4, {40, 32}, {33, 32});
  for (const Case& c : cases()) {
    CAPTURE(c.name);
    std::vector<Replay> seen;
    for (const double factor : {1.0, 1.25}) {  // one after the other on the same backends, frequencies alike
      CacheShape shape = make_shape(1, 3, 2, 64);
      shape.rope.attention_factor = factor;
      const auto set = set_of(c, shape, 1);
      const Tokens x(shape, 230, 22);
      const Replay want = replay(set, policy, *reference, x, 23), got = replay(set, policy, *fast, x, 23);
      CHECK(worst_difference(want.out, got.out) < tolerance(8, 64));
      if (!table->can(set->units()[0].codec->plan(), Role::kKey))
        CHECK(worst_difference(want.out, replay(set, policy, *table, x, 23).out) <
              tolerance(8, 64) + 2.0 * 6.0 * scan::kScanLimit);
      seen.push_back(got);
    }
    CHECK(worst_difference(seen[0].out, seen[1].out) > 1e-3);
  }
}

TEST_CASE("Exact keys stored before RoPE give what those stored after it give, with an attention factor",
          "[backends]") {
  CacheShape shape = make_shape(1, 3, 2, 64);
  shape.rope.attention_factor = 1.25;
  const auto backend = make_attention_backend("cpu-reconstruct");
  const auto set = make_set(shape, 1, [&](Role role, int channels) {
    DecodePlan p = empty_plan(channels, 1, 0);
    add_table(p, 8, 4);
    if (role == Role::kKey) p.rope = RopePlacement::kPre;
    return std::make_shared<PlanCodec>(p, 0);
  });
  const Tokens x(shape, 100, 23);
  CachePolicy exact = policy_of(100, {128, 64}, {128, 64});  // nothing is coded
  exact.exact_dtype = DType::kF32;
  CHECK(worst_difference(replay(set, exact, *backend, x, 20).out,
                         replay(exact_codec_set(shape, DType::kF32), exact, *backend, x, 20).out) < tolerance(8, 64));
}

TEST_CASE("Hard keys: outlier channels, loud sinks", "[backends]") {
  const auto reference = make_attention_backend("reference"), fast = make_attention_backend("cpu-reconstruct");
  const CacheShape shape = make_shape(1, 4, 1, 64);
  const auto set = set_of(cases()[5], shape, 1);
  const Tokens x(shape, 200, 31, true);
  const CachePolicy policy = policy_of(2, {16, 16}, {16, 16});
  const Replay want = replay(set, policy, *reference, x, 64), got = replay(set, policy, *fast, x, 64);
  CHECK(worst_difference(want.out, got.out) < tolerance(60, 64));
}

TEST_CASE("Heads, groups and head sizes", "[backends]") {
  const auto reference = make_attention_backend("reference"), fast = make_attention_backend("cpu-reconstruct");
  const int group = GENERATE(1, 3, 4, 7);
  const int d = GENERATE(64, 80, 96, 128, 256);
  const CacheShape shape = make_shape(1, group, 2, d);
  const auto set = set_of(cases()[0], shape, 1);
  const Tokens x(shape, 90, 41);
  const CachePolicy policy = policy_of(1, {10, 4}, {10, 4});
  CHECK(worst_difference(replay(set, policy, *reference, x, 30).out, replay(set, policy, *fast, x, 30).out) <
        tolerance(8, d));
}

TEST_CASE("The identity codec gives the bits of the exact cache", "[identity]") {
  const auto backend = make_attention_backend("cpu-reconstruct");
  const CacheShape shape = make_shape(2, 3, 3, 64);
  const Tokens x(shape, 300, 51, true);
  for (const DType type : {DType::kF16, DType::kBF16, DType::kF32}) {
    const auto set = exact_codec_set(shape, type);
    CachePolicy exact = CachePolicy::exact(type);
    const std::vector<FlushRule> rules = {{128, 64}, {1, 32}, {33, 1}, {0, 1}};
    for (const int64_t block : {int64_t{1}, int64_t{50}, int64_t{300}}) {
      const Replay want = replay(set, exact, *backend, x, block);
      CHECK(want.stats.coded_mass == 0);
      for (const FlushRule& k : rules)
        for (const FlushRule& v : rules) {
          CachePolicy policy = policy_of(4, k, v);
          policy.exact_dtype = type;
          if (block == 1 && k.flush != v.flush) continue;
          const Replay got = replay(set, policy, *backend, x, block);
          CHECK((want.out.storage == got.out.storage));
          CHECK(got.stats.coded_mass > 0);
        }
    }
    const Replay all = replay(set, policy_of(0, {128, 64}, {128, 64}), *backend, x, 300, Visibility::kAllCoded);
    if (type == DType::kF16) CHECK((all.out.storage == replay(set, exact, *backend, x, 300).out.storage));
  }
}

TEST_CASE("Block replay gives the bits of step replay, across flushes of both roles", "[blocks]") {
  const auto backend = make_attention_backend("cpu-reconstruct");
  const CacheShape shape = make_shape(1, 3, 1, 64);
  const Tokens x(shape, 210, 61);
  for (const Case& c : cases()) {
    CAPTURE(c.name);
    const auto set = set_of(c, shape, 1);
    const int64_t f = c.block_tokens;
    const CachePolicy kivi = policy_of(0, {1, std::max<int64_t>(32, f)}, {f == 1 ? 33 : 32, f});
    const int64_t page = std::max<int64_t>(32, f);
    for (const CachePolicy& policy : {kivi, policy_of(5, {64, 32}, {0, f}), policy_of(5, {0, page}, {0, page})}) {
      const Replay steps = replay(set, policy, *backend, x, 1);
      CHECK((replay(set, policy, *backend, x, 37).out.storage == steps.out.storage));
      CHECK((replay(set, policy, *backend, x, 210).out.storage == steps.out.storage));
    }
  }
}

TEST_CASE("Nothing coded yet, no window, sinks only", "[backends]") {
  const auto reference = make_attention_backend("reference"), fast = make_attention_backend("cpu-reconstruct");
  const CacheShape shape = make_shape(1, 2, 1, 64);
  const auto set = set_of(cases()[0], shape, 1);
  const Tokens x(shape, 60, 71);
  const auto same = [&](const CachePolicy& policy) {
    for (const int64_t block : {1, 13, 60})
      CHECK(worst_difference(replay(set, policy, *reference, x, block).out, replay(set, policy, *fast, x, block).out) <
            tolerance(8, 64));
  };
  same(policy_of(4, {128, 64}, {128, 64}));
  same(policy_of(0, {0, 1}, {0, 1}));
  same(policy_of(100, {0, 1}, {0, 1}));
  same(policy_of(7, {1, 1}, {64, 1}));
}

TEST_CASE("A row that is not finite stays so on every path", "[backends]") {
  const CacheShape shape = make_shape(1, 3, 2, 64);
  for (const float bad : {NAN, INFINITY})
    for (const char* name : {"reference", "cpu-reconstruct", "cpu-table", "cpu-table8", "auto"})
      for (const int64_t block : {1, 40}) {
        CAPTURE(bad, name, block);
        Tokens x(shape, 400, 181);
        x.q(320, 2 * 64 + 5) = bad;  // query head 2 at position 320
        const auto backend = make_attention_backend(name);
        const Replay r = replay(set_of(cases()[0], shape, 1), policy_of(4, {32, 16}, {32, 16}), *backend, x, block);
        for (int64_t t = 0; t < 400; ++t)
          for (int h = 0; h < 6; ++h)
            for (int c = 0; c < 64; ++c) REQUIRE(std::isfinite(r.out(t, h * 64 + c)) == (t != 320 || h != 2));
        CHECK(std::isnan(r.stats.coded_mass));
      }
}

TEST_CASE("Sequences do not see each other", "[backends]") {
  // One backend serves many caches in turn, as a batch of sequences does.
  const CacheShape shape = make_shape(1, 3, 1, 64);
  const auto set = set_of(cases()[5], shape, 1);
  const CachePolicy policy = policy_of(4, {16, 16}, {16, 16});
  for (const char* name : {"cpu-reconstruct", "cpu-table", "auto"}) {
    const auto shared = make_attention_backend(name);
    std::vector<std::unique_ptr<CompressedCache>> caches;
    std::vector<std::unique_ptr<KvSessionCpu>> sessions;
    std::vector<Tokens> tokens;
    std::vector<Matrix<float>> outs;
    for (uint64_t i = 0; i < 3; ++i) {
      caches.push_back(std::make_unique<CompressedCache>(set, policy));
      sessions.push_back(std::make_unique<KvSessionCpu>(*caches.back(), *shared));
      tokens.emplace_back(shape, 120, 121 + 10 * i);
      outs.emplace_back(120, shape.q_heads * 64);
    }
    for (int64_t t = 0; t < 120; t += 8)
      for (size_t i = 0; i < 3; ++i) {
        sessions[i]->begin_block(8);
        sessions[i]->attend(0, tokens[i].q.view().slice_rows(t, 8), tokens[i].k.view().slice_rows(t, 8),
                            tokens[i].v.view().slice_rows(t, 8), MutMatrix(outs[i]).slice_rows(t, 8));
        sessions[i]->end_block();
      }
    for (size_t i = 0; i < 3; ++i) {
      const auto alone = make_attention_backend(name);
      CHECK((replay(set, policy, *alone, tokens[i], 8).out.storage == outs[i].storage));
    }
  }
}

TEST_CASE("Attention after a rollback equals attention without it", "[backends]") {
  const CacheShape shape = make_shape(1, 3, 1, 64);
  const auto set = set_of(cases()[0], shape, 1);
  const Tokens x(shape, 260, 151);
  const auto backend = make_attention_backend("cpu-reconstruct");
  const auto run = [&](bool draft) {
    CompressedCache cache(set, policy_of(4, {64, 32}, {64, 32}));
    KvSessionCpu session(cache, *backend);
    Matrix<float> out(20, shape.q_heads * 64), first(200, shape.q_heads * 64);
    const auto block = [&](int64_t from, int64_t n, Matrix<float>& to) {
      session.begin_block(n);
      session.attend(0, x.q.view().slice_rows(from, n), x.k.view().slice_rows(from, n), x.v.view().slice_rows(from, n),
                     to);
      session.end_block();
    };
    block(0, 200, first);
    if (draft) {
      block(230, 20, out);
      cache.truncate(200);
    }
    block(200, 20, out);
    return out.storage;
  };
  CHECK((run(false) == run(true)));
}

TEST_CASE("The thread count changes no bit", "[threads]") {
  const CacheShape shape = make_shape(2, 3, 3, 64);
  const auto set = set_of(cases()[5], shape, 1);
  const Tokens x(shape, 700, 161);
  const CachePolicy policy = policy_of(4, {64, 32}, {64, 32});
  const int before = thread_count();
  for (const char* name : {"cpu-reconstruct", "cpu-table", "cpu-table8"}) {
    const auto backend = make_attention_backend(name);
    set_thread_count(1);
    const auto one = replay(set, policy, *backend, x, 128).out.storage;
    set_thread_count(3);
    CHECK((replay(set, policy, *backend, x, 128).out.storage == one));
    set_thread_count(before);
  }
}
