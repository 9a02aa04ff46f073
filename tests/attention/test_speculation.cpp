// Tentative blocks: what is taken back leaves no trace, what is kept leaves the cache of its tokens alone.
#include "attention/session_cpu.h"
#include "cache/cache_support.h"
#include "cache/policies/kinds.h"
#include "support/catch.h"
#include "support/codec_rows.h"
#include "support/error_of.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

std::shared_ptr<const CodecSet> nibbles(const CacheShape& shape) {
  return make_set(shape, 1, [&](Role role, int) -> std::shared_ptr<Codec> {
    return find_method("quantspec").make({{"group", 16}}, unit_of(shape.head_dim, 1, role));
  });
}

std::vector<float> attended(CompressedCache& cache, const Tokens& x, int64_t n, Visibility visibility,
                            const std::string& attention) {
  const auto backend = make_attention_backend(attention);
  KvSessionCpu kv(cache, *backend);
  const int64_t first = cache.length();
  std::vector<float> all;
  kv.begin_block(n, visibility);
  for (int layer = 0; layer < cache.shape().layers; ++layer) {
    Matrix<float> out(n, x.q.cols);
    kv.attend(layer, x.q.view().slice_rows(first, n), x.k.view().slice_rows(first, n), x.v.view().slice_rows(first, n),
              out);
    all.insert(all.end(), out.storage.begin(), out.storage.end());
  }
  kv.end_block();
  return all;
}

}  // namespace

TEST_CASE("tentative blocks code nothing, and a commit leaves the cache of what it keeps", "[attention][speculation]") {
  const CacheShape shape = make_shape(2, 2, 2, 16);
  const auto set = nibbles(shape);
  const Tokens x(shape, 400, 7), guesses(shape, 400, 8);
  // Unlike rules a role, whose flushes fall apart.
  for (const CachePolicy& policy : {policy_of(0, {17, 16}, {17, 16}), policy_of(4, {20, 32}, {40, 16})}) {
    CountingResource memory;
    CompressedCache cache(std::make_shared<const CacheModel>(set, 1), policy, &memory);
    Rng rng(3);
    feed(cache, x, 0, 10);
    while (cache.length() < 300) {
      const int64_t held = cache.length();
      cache.speculate();
      const int64_t limit = cache.block_limit();
      REQUIRE(limit >= 1);
      // No query of a block of that length sees more coded than is there; the next one would.
      CHECK(cache.coded_end(Role::kKey, held + limit - 1) <= policy.k.coded_among(policy.sinks, held));
      CHECK((policy.k.coded_end(policy.sinks, held + limit) > policy.k.coded_among(policy.sinks, held) ||
             policy.v.coded_end(policy.sinks, held + limit) > policy.v.coded_among(policy.sinks, held)));
      const ByteLedger before = cache.bytes();
      const int64_t drafts = std::min<int64_t>(limit - 1, 5);
      for (int64_t i = 0; i < drafts; ++i) feed(cache, guesses, held + i, 1, Visibility::kDraft);
      cache.truncate(held);
      CHECK(same(cache.bytes(), before));
      feed(cache, x, held, drafts + 1);
      CHECK(cache.bytes().codes == before.codes);
      CHECK(cache.bytes().total_sequence() == memory.live());
      cache.commit(held + 1 + static_cast<int64_t>(rng.below(static_cast<uint64_t>(drafts + 1))));
      CHECK(cache.bytes().total_sequence() == memory.live());
    }
    CountingResource other;
    CompressedCache straight(set, policy, &other);
    for (int64_t t = 0; t < cache.length(); ++t) feed(straight, x, t, 1);
    CHECK(same(cache.bytes(), straight.bytes()));
    CHECK(memory.live() == other.live());
    for (size_t u = 0; u < set->units().size(); ++u) {
      const CodeBlock a = CacheView(cache).fetch_codes(u), b = CacheView(straight).fetch_codes(u);
      CHECK(a.fields == b.fields);
      CHECK(a.sides == b.sides);
    }
    CHECK(attended(cache, x, 1, Visibility::kReplay, "reference") ==
          attended(straight, x, 1, Visibility::kReplay, "reference"));
  }
}

TEST_CASE("drafts read the upper half of each code, by every path, and say how many bytes",
          "[attention][speculation]") {
  const CacheShape shape = make_shape(2, 2, 2, 16);
  const auto whole = nibbles(shape);
  const auto upper = make_set(shape, 1, [&](Role role, int) -> std::shared_ptr<Codec> {
    const char* axis = role == Role::kKey ? "channel" : "token";
    return find_method("rtn").make({{"bits", 4}, {"group", 16}, {"axis", axis}}, unit_of(shape.head_dim, 1, role));
  });
  const CachePolicy policy = policy_of(0, {17, 16}, {17, 16});
  const Tokens x(shape, 200, 9);
  for (const std::string attention : {"reference", "cpu-reconstruct"}) {
    CAPTURE(attention);
    CompressedCache cache(std::make_shared<const CacheModel>(whole, 1), policy), int4(upper, policy);
    feed(cache, x, 0, 150);
    feed(int4, x, 0, 150);
    const CacheReads of_int4 = int4.reads(1);
    cache.speculate();
    CHECK(attended(cache, x, 1, Visibility::kDraft, attention) == attended(int4, x, 1, Visibility::kReplay, attention));
    cache.truncate(150);
    const CacheReads draft = cache.reads(1, true), target = cache.reads(1);
    CHECK(draft.codes == of_int4.codes);
    CHECK(draft.exact == of_int4.exact);
    // 128 coded tokens of 4 units a layer: 8 bits and two scales of 16 bits for each 16 values, or 4 bits and those.
    CHECK(target.codes == 2 * 4 * 128 * 16 * (8 + 2) / 8);
    CHECK(draft.codes == 2 * 4 * 128 * 16 * (4 + 2) / 8);
    CHECK(target.exact == 2 * 4 * (151 - 128) * 16 * 2);
    CHECK(target.codes + target.exact < cache.bytes().total_sequence() + 2 * 4 * 16 * 2);
    cache.commit(150);
  }
}

TEST_CASE("what can't be speculated is refused by name", "[attention][speculation]") {
  const CacheShape shape = make_shape(1, 1, 1, 16);
  const auto set = nibbles(shape);
  check_says(error_of([&] { CacheModel(exact_codec_set(shape), 1); }),
             {"a draft can't read codec 'exact'", "one level alone", "quantspec"});
  check_says(error_of([&] { CacheModel(set, 2); }), {"level 2", "1 to 1"});
  CompressedCache bare(set, policy_of(0, {0, 16}, {0, 16}));
  feed(bare, Tokens(shape, 20, 1), 0, 15);  // the next query sees its own token coded
  check_says(error_of([&] { bare.speculate(); }), "window of 1 token");
  CachePolicy ruled = CachePolicy::from_json({{"sinks", 0}, {"window", 32}, {"flush", 16}, {"policy", "h2o"}});
  CompressedCache summing(set, ruled);
  check_says(error_of([&] { summing.speculate(); }), {"h2o", "all, streaming"});
}
