#include "attention/plan_codec.h"
#include "support/catch.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

struct Case {
  std::string name;
  std::function<void(DecodePlan&, Role)> build;
  int block_tokens = 1;
  int overlay_every = 0;
  int code_extra = 0;  // code channels beyond the unit's
};

std::vector<Case> cases() {
  return {
      {"product code, 8 bits, width 4", [](DecodePlan& p, Role) { add_table(p, 8, 4); }},
      {"product code, 4 bits, width 2", [](DecodePlan& p, Role) { add_table(p, 4, 2); }},
      {"product code, 10 bits of 700 entries, width 8", [](DecodePlan& p, Role) { add_table(p, 10, 8, 1, false, false, 700); }},
      {"residual, 3 stages over 16 channels, shared books", [](DecodePlan& p, Role) { add_table(p, 6, 16, 3, false, true); }},
      {"strided residual", [](DecodePlan& p, Role) { add_table(p, 7, 8, 2, true, true); }},
      {"product code with bias, map and token scale",
       [](DecodePlan& p, Role) {
         add_table(p, 8, 4);
         add_map(p, 5);
         add_token_scale(p, 1);
         p.inner_bias = random_bias(p.channels, 6);
         p.outer_bias = random_bias(p.channels, 7);
       }},
      {"map to more code channels than channels", [](DecodePlan& p, Role) { add_table(p, 5, 4); add_map(p, 8); p.outer_bias = random_bias(p.channels, 3); }, 1, 0, 16},
      {"diagonal map and bias",
       [](DecodePlan& p, Role) {
         add_table(p, 8, 8);
         p.map.diagonal = random_bias(p.channels, 9);
         p.inner_bias = random_bias(p.channels, 10);
         add_token_scale(p, 1);
       }},
      {"scale groups inside a head", [](DecodePlan& p, Role) { add_table(p, 8, 4); add_map(p, 11); add_token_scale(p, p.channels / 16); }},
      {"levels, per token", [](DecodePlan& p, Role) { add_levels(p, 3, 16, 1, true); }},
      {"levels, token groups", [](DecodePlan& p, Role) { add_levels(p, 2, 1, 16, false); }, 32},
      {"non-uniform levels through a map", [](DecodePlan& p, Role) { add_levels(p, 4, 8, 32, false, true); add_map(p, 12); }, 32},
      {"dense channels beside a table",
       [](DecodePlan& p, Role) {
         add_table(p, 8, 4);
         add_dense(p, {1, 5, 6});
       }},
      {"overlay", [](DecodePlan& p, Role) { add_table(p, 8, 4); add_map(p, 13); }, 1, 3},
      {"overlay on levels", [](DecodePlan& p, Role) { add_levels(p, 2, 8, 1, true); }, 1, 5},
      {"keys before RoPE", [](DecodePlan& p, Role r) { add_table(p, 8, 4); p.outer_bias = random_bias(p.channels, 4); if (r == Role::kKey) p.rope = RopePlacement::kPre; }},
      {"keys before RoPE through a map", [](DecodePlan& p, Role r) { add_table(p, 6, 8, 2); add_map(p, 15); if (r == Role::kKey) p.rope = RopePlacement::kPre; }},
      {"score map", [](DecodePlan& p, Role) { add_table(p, 8, 4); p.score = {ScoreMap::Kind::kRange, 0.3f, 0.2f}; }},
  };
}

std::shared_ptr<const CodecSet> set_of(const Case& c, const CacheShape& shape, int heads) {
  return make_set(shape, heads, [&](Role role, int channels) {
    DecodePlan p = empty_plan(channels, c.block_tokens, c.code_extra ? channels + c.code_extra : 0);
    c.build(p, role);
    return std::make_shared<PlanCodec>(p, c.overlay_every);
  });
}

CachePolicy policy_of(int64_t sinks, FlushRule k, FlushRule v) {
  CachePolicy p;
  p.sinks = sinks;
  p.k = k;
  p.v = v;
  return p;
}

// fp32 sums of n terms of size s err by about sqrt(n) * 2^-24 * s; logits err by that times |q||k| and enter through
// exp. 64 covers the constants of a softmax over values of unit size, with logits up to 40.
double tolerance(double logit_scale, int64_t d) { return 64.0 * 0x1p-24 * std::sqrt(static_cast<double>(d)) * (1.0 + logit_scale); }

}  // namespace

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
  CHECK(worst_difference(replay(set, policy, *reference, x, 30).out, replay(set, policy, *fast, x, 30).out) < tolerance(8, d));
}

TEST_CASE("The identity codec gives the bits of the exact cache", "[identity]") {
  const auto backend = make_attention_backend("cpu-reconstruct");
  const CacheShape shape = make_shape(2, 3, 3, 64);
  const Tokens x(shape, 300, 51, true);
  for (const DType type : {DType::kF16, DType::kBF16, DType::kF32}) {
    const auto set = exact_codec_set(shape, type);
    CachePolicy exact = CachePolicy::exact(type);
    const std::vector<FlushRule> rules = {{128, 64}, {1, 32}, {33, 1}, {0, 1}};
    for (const FlushRule& k : rules)
      for (const FlushRule& v : rules)
        for (const int64_t block : {int64_t{1}, int64_t{50}, int64_t{300}}) {
          CachePolicy policy = policy_of(4, k, v);
          policy.exact_dtype = type;
          if (block == 1 && k.flush != v.flush) continue;
          const Replay want = replay(set, exact, *backend, x, block), got = replay(set, policy, *backend, x, block);
          CHECK((want.out.storage == got.out.storage));
          CHECK(want.stats.coded_mass == 0);
          CHECK(got.stats.coded_mass > 0);
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
    const Replay steps = replay(set, kivi, *backend, x, 1);
    CHECK((replay(set, kivi, *backend, x, 37).out.storage == steps.out.storage));
    CHECK((replay(set, kivi, *backend, x, 210).out.storage == steps.out.storage));
  }
}

TEST_CASE("Nothing coded yet, no window, sinks only", "[backends]") {
  const auto reference = make_attention_backend("reference"), fast = make_attention_backend("cpu-reconstruct");
  const CacheShape shape = make_shape(1, 2, 1, 64);
  const auto set = set_of(cases()[0], shape, 1);
  const Tokens x(shape, 60, 71);
  const auto same = [&](const CachePolicy& policy) {
    for (const int64_t block : {1, 13, 60})
      CHECK(worst_difference(replay(set, policy, *reference, x, block).out, replay(set, policy, *fast, x, block).out) < tolerance(8, 64));
  };
  same(policy_of(4, {128, 64}, {128, 64}));
  same(policy_of(0, {0, 1}, {0, 1}));
  same(policy_of(100, {0, 1}, {0, 1}));
  same(policy_of(7, {1, 1}, {64, 1}));
}
