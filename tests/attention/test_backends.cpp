#include <algorithm>
#include <limits>
#include <numeric>
#include <optional>
#include <set>

#include "attention/backends_cpu.h"
#include "attention/plan_codec.h"
#include "attention/scan_cpu.h"
#include "attention/session_cpu.h"
#include "cache/kernels.h"
#include "core/cpu.h"
#include "core/thread_pool.h"
#include "support/catch.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

// What this build and processor have beside the portable form.
std::vector<decltype(&scan::fixed_portable)> fixed_kernels() {
  std::vector<decltype(&scan::fixed_portable)> out;
  if constexpr (kX86Units) {
    if (cpu_features().avx2) out.push_back(scan::fixed_avx2);
    if (cpu_features().avx512_vbmi) out.push_back(scan::fixed_vbmi);
  }
  return out;
}
std::vector<decltype(&scan::bytes_portable)> bytes_kernels() {
  std::vector<decltype(&scan::bytes_portable)> out;
  if constexpr (kX86Units) {
    if (cpu_features().avx2) out.push_back(scan::bytes_avx2);
    if (cpu_features().avx512_vbmi) out.push_back(scan::bytes_vbmi);
  }
  return out;
}

struct Case {
  std::string name;
  std::function<void(DecodePlan&, Role)> build;
  int block_tokens = 1;
  int overlay_every = 0;
  int code_extra = 0;  // code channels beyond the unit's
  int coded_head = 0;  // or: code channels of a head
};

std::vector<Case> cases() {
  return {
      {"product code, 8 bits, width 4", [](DecodePlan& p, Role) { add_table(p, 8, 4); }},
      {"product code, 4 bits, width 2", [](DecodePlan& p, Role) { add_table(p, 4, 2); }},
      {"product code, 10 bits of 700 entries, width 8",
       [](DecodePlan& p, Role) { add_table(p, 10, 8, 1, false, false, 700); }},
      {"residual, 3 stages over 16 channels, shared books",
       [](DecodePlan& p, Role) { add_table(p, 6, 16, 3, false, true); }},
      {"strided residual", [](DecodePlan& p, Role) { add_table(p, 7, 8, 2, true, true); }},
      {"product code with bias, map and token scale",
       [](DecodePlan& p, Role) {
         add_table(p, 8, 4);
         add_map(p, 5);
         add_token_scale(p, 1);
         p.inner_bias = random_bias(p.channels, 6);
         p.outer_bias = random_bias(p.channels, 7);
       }},
      {"map to more code channels than channels",
       [](DecodePlan& p, Role) {
         add_table(p, 5, 4);
         add_map(p, 8);
         p.outer_bias = random_bias(p.channels, 3);
       },
       1, 0, 16},
      {"diagonal map and bias",
       [](DecodePlan& p, Role) {
         add_table(p, 8, 8);
         p.map = DiagonalMap{random_bias(p.channels, 9)};
         p.inner_bias = random_bias(p.channels, 10);
         add_token_scale(p, 1);
       }},
      {"scale groups inside a head",
       [](DecodePlan& p, Role) {
         add_table(p, 8, 4);
         add_map(p, 11);
         add_token_scale(p, p.channels / 16);
       }},
      {"levels, per token", [](DecodePlan& p, Role) { add_levels(p, 3, 16, 1, true); }},
      {"levels, token groups", [](DecodePlan& p, Role) { add_levels(p, 2, 1, 16, false); }, 32},
      {"non-uniform levels through a map",
       [](DecodePlan& p, Role) {
         add_levels(p, 4, 8, 32, false, true);
         add_map(p, 12);
       },
       32},
      {"dense channels beside a table",
       [](DecodePlan& p, Role) {
         add_table(p, 8, 4);
         add_dense(p, {1, 5, 6});
       }},
      {"overlay",
       [](DecodePlan& p, Role) {
         add_table(p, 8, 4);
         add_map(p, 13);
       },
       1, 3},
      {"overlay on levels", [](DecodePlan& p, Role) { add_levels(p, 2, 8, 1, true); }, 1, 5},
      {"keys before RoPE",
       [](DecodePlan& p, Role r) {
         add_table(p, 8, 4);
         p.outer_bias = random_bias(p.channels, 4);
         if (r == Role::kKey) p.rope = RopePlacement::kPre;
       }},
      {"keys before RoPE through a map",
       [](DecodePlan& p, Role r) {
         add_table(p, 6, 8, 2);
         add_map(p, 15);
         if (r == Role::kKey) p.rope = RopePlacement::kPre;
       }},
      {"channels gathered from fewer codes",
       [](DecodePlan& p, Role) {
         add_table(p, 6, 4);
         add_gather(p);
         p.outer_bias = random_bias(p.channels, 5);
         add_token_scale(p, 1);
       },
       1, 0, -16},
      {"keys before RoPE gathered from fewer codes, with scales inside a head",
       [](DecodePlan& p, Role r) {
         add_levels(p, 3, 8, 1, true);
         add_gather(p);
         add_token_scale(p, p.channels / 16);
         if (r == Role::kKey) p.rope = RopePlacement::kPre;
       },
       1, 0, -16},
      {"unequal blocks",
       [](DecodePlan& p, Role) {
         add_table(p, 6, 4);
         BlockMap map;
         for (int at = 0; at < p.channels; at += 64)
           for (const auto& [rows, cols] : {std::pair{8, 16}, {40, 48}}) {
             const Matrix<float> m = random_matrix(rows, cols, 40 + static_cast<uint64_t>(at), 0.2);
             map.blocks.push_back({rows, cols, {m.storage.begin(), m.storage.end()}});
           }
         p.map = map;
       },
       1, 0, 0, 48},
      {"Hadamard between signs and a diagonal",
       [](DecodePlan& p, Role) {
         add_table(p, 8, 4);
         p.map = HadamardMap{p.channels, 32, random_bias(p.channels, 21), random_bias(p.channels, 22)};
         p.inner_bias = random_bias(p.channels, 6);
         add_token_scale(p, 1);
       }},
      {"keys before RoPE through Hadamard, with scales inside a head",
       [](DecodePlan& p, Role r) {
         add_levels(p, 3, 16, 1, true);
         p.map = HadamardMap{p.channels, 64, random_bias(p.channels, 23), {}};
         p.outer_bias = random_bias(p.channels, 4);
         add_token_scale(p, p.channels / 32);
         if (r == Role::kKey) p.rope = RopePlacement::kPre;
       }},
      {"Hadamard over all heads of a unit",
       [](DecodePlan& p, Role) {
         add_table(p, 7, 8);
         p.map = HadamardMap{p.channels, p.channels, {}, random_bias(p.channels, 24)};
       }},
      {"score map",
       [](DecodePlan& p, Role) {
         add_table(p, 8, 4);
         p.score = {ScoreMap::Kind::kRange, 0.3f, 0.2f};
       }},
  };
}

std::shared_ptr<const CodecSet> set_of(const Case& c, const CacheShape& shape, int heads) {
  return make_set(shape, heads, [&](Role role, int channels) {
    DecodePlan p = empty_plan(channels, c.block_tokens,
                              c.coded_head   ? c.coded_head * (channels / shape.head_dim)
                              : c.code_extra ? channels + c.code_extra
                                             : 0);
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
double tolerance(double logit_scale, int64_t d) {
  return 64.0 * 0x1p-24 * std::sqrt(static_cast<double>(d)) * (1.0 + logit_scale);
}

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

TEST_CASE("cpu-table equals reconstruction and the reference where it can", "[table]") {
  const auto reference = make_attention_backend("reference"), rebuilt = make_attention_backend("cpu-reconstruct"),
             table = make_attention_backend("cpu-table");
  int ran = 0;
  for (const Case& c : cases()) {
    for (const int heads : {1, 2}) {
      CAPTURE(c.name, heads);
      const CacheShape shape = make_shape(1, 3, 2, 64);
      const auto set = set_of(c, shape, heads);
      const Tokens x(shape, 330, 81);
      const CachePolicy policy = policy_of(4, {40, 32}, {33, 32});
      const auto summed = make_tiled_backend(KeyScan::kFixed, ValueSums::kAlways);
      const auto reason = table->can(set->units()[0].codec->plan(), Role::kKey);
      if (reason) {
        CHECK_THROWS_AS(replay(set, policy, *table, x, 330), Error);
        continue;
      }
      ++ran;
      // A probability moves by e^error - 1 of itself, an output by that times twice the largest value.
      const double bound = tolerance(8, 64) + 2.0 * 6.0 * scan::kScanLimit;
      for (const int64_t block : {1, 41}) {
        const Replay want = replay(set, policy, *reference, x, block), got = replay(set, policy, *table, x, block);
        CHECK(worst_difference(want.out, got.out) < bound);
        CHECK(worst_difference(replay(set, policy, *rebuilt, x, block).out, got.out) < bound);
        CHECK(worst_difference(want.out, replay(set, policy, *summed, x, block).out) < bound);
        CHECK(want.coded_share() == Approx(got.coded_share()).epsilon(2e-3));
      }
    }
  }
  CHECK(ran >= 8);
}

TEST_CASE("Values summed by code equal decoded values and the reference, wherever a segment or a boundary lies",
          "[sums]") {
  // kAlways: segments of 512 tokens, so that 1,100 tokens meet two whole ones, one that grows, sinks and the window.
  // Keys are decoded: all that may differ is the order of fp32 sums over values.
  const auto reference = make_attention_backend("reference"),
             decoded = make_tiled_backend(KeyScan::kNone, ValueSums::kNever),
             summed = make_tiled_backend(KeyScan::kNone, ValueSums::kAlways);
  int ran = 0;
  for (const Case& c : cases()) {
    for (const auto& [group, heads] : {std::pair{1, 1}, {3, 2}, {4, 1}, {7, 1}}) {
      CAPTURE(c.name, group, heads);
      const CacheShape shape = make_shape(1, group, 2, 64);
      const auto set = set_of(c, shape, heads);
      const Tokens x(shape, 1100, 201);
      const int64_t f = c.block_tokens;
      const CachePolicy kivi = policy_of(4, {1, std::max<int64_t>(32, f)}, {f == 1 ? 33 : 32, f});
      const auto& units = set->units();
      const bool can = !value_sum_reason(units[units.size() - 1].codec->plan());
      ran += can;
      const Replay want = replay(set, kivi, *decoded, x, 137);
      const auto fresh = make_tiled_backend(KeyScan::kNone, ValueSums::kAlways);
      const Replay got = replay(set, kivi, *fresh, x, 137);
      CHECK(fresh->paths() == std::vector<std::string>{can ? "cpu-reconstruct-sums" : "cpu-reconstruct"});
      CHECK(worst_difference(want.out, got.out) < tolerance(8, 64));
      CHECK((want.out.storage == got.out.storage) == !can);
      CHECK(want.coded_share() == Approx(got.coded_share()).epsilon(1e-5));
      if (group == 3) CHECK(worst_difference(replay(set, kivi, *reference, x, 137).out, got.out) < tolerance(8, 64));
    }
  }
  CHECK(ran >= 4 * 10);
}

TEST_CASE("Sums by code: block replay gives the bits of step replay", "[sums][blocks]") {
  for (const KeyScan scan : {KeyScan::kNone, KeyScan::kFixed, KeyScan::kBytes}) {
    const auto summed = make_tiled_backend(scan, ValueSums::kAlways);
    const CacheShape shape = make_shape(1, 3, 1, 64);
    const Tokens x(shape, 610, 211);
    for (const Case& c : cases()) {
      CAPTURE(c.name, static_cast<int>(scan));
      const auto set = set_of(c, shape, 1);
      const DecodePlan plan = set->units()[1].codec->plan();
      if (value_sum_reason(plan) || summed->can(set->units()[0].codec->plan(), Role::kKey)) continue;
      for (const CachePolicy& policy : {policy_of(0, {1, 32}, {33, 1}), policy_of(5, {64, 32}, {0, 1})}) {
        const Replay steps = replay(set, policy, *summed, x, 1);
        CHECK((replay(set, policy, *summed, x, 37).out.storage == steps.out.storage));
        CHECK((replay(set, policy, *summed, x, 610).out.storage == steps.out.storage));
      }
    }
  }
}

TEST_CASE("Sums by code follow a maximum that rises far, and any threads give the same bits", "[sums][threads]") {
  // Keys grow along the sequence: late logits are far above those that the sums began with.
  const auto reference = make_attention_backend("reference"),
             summed = make_tiled_backend(KeyScan::kNone, ValueSums::kAlways);
  const CacheShape shape = make_shape(2, 4, 3, 64);
  for (const size_t i : {size_t{0}, size_t{3}, size_t{5}, size_t{7}}) {
    CAPTURE(cases()[i].name);
    const auto set = make_set(shape, 1, [&](Role role, int channels) {
      DecodePlan p = empty_plan(channels);
      if (role == Role::kValue)
        cases()[i].build(p, role);
      else
        add_dense(p, [&] {
          std::vector<int32_t> all(static_cast<size_t>(channels));
          for (int c = 0; c < channels; ++c) all[static_cast<size_t>(c)] = c;
          return all;
        }());
      if (role == Role::kKey) p.outer_bias = random_bias(channels, 9);
      return std::make_shared<PlanCodec>(p);
    });
    Tokens x(shape, 700, 221);
    // Exact keys in front and behind; each block of queries is louder than the one before.
    for (int64_t t = 0; t < 700; ++t)
      for (int64_t c = 0; c < x.q.cols; ++c) x.q(t, c) *= 0.1f + 0.05f * static_cast<float>(t % 100);
    const CachePolicy policy = policy_of(4, {64, 32}, {33, 1});
    const int before = thread_count();
    set_thread_count(1);
    const Replay one = replay(set, policy, *summed, x, 100);
    CHECK(worst_difference(replay(set, policy, *reference, x, 100).out, one.out) < tolerance(60, 64));
    set_thread_count(3);
    CHECK((replay(set, policy, *summed, x, 100).out.storage == one.out.storage));
    set_thread_count(before);
  }
}

TEST_CASE("Hard keys go through fp32 tables", "[table]") {
  const auto reference = make_attention_backend("reference"), table = make_attention_backend("cpu-table");
  const CacheShape shape = make_shape(1, 4, 1, 64);
  const auto set = make_set(shape, 1, [&](Role, int channels) {
    DecodePlan p = empty_plan(channels);
    add_table(p, 8, 4, 1, false, false, 0, 5);
    DiagonalMap map{std::vector<float>(static_cast<size_t>(channels), 1.0f)};
    map.factor[7] = 60.0f;
    p.map = map;
    return std::make_shared<PlanCodec>(p);
  });
  const Tokens x(shape, 200, 91, true);
  const CachePolicy policy = policy_of(2, {16, 16}, {16, 16});
  for (const int64_t block : {1, 64})
    CHECK(worst_difference(replay(set, policy, *reference, x, block).out, replay(set, policy, *table, x, block).out) <
          tolerance(200, 64) + 12.0 * scan::kScanLimit);
}

TEST_CASE("Fixed-point tables: the stated bound holds, all kernels agree", "[table]") {
  for (const int64_t slots : {1, 16, 56, 256})
    for (const int64_t entries : {7, 16, 32, 33, 64, 128, 200, 256}) {
      Matrix<float> lut = random_matrix(slots, 256, 17, 0.01);
      scan::FixedTables tables;
      scan::quantize(lut.data(), slots, entries, 256, tables);
      REQUIRE(tables.bound <= scan::kScanLimit);
      Rng rng(3);
      std::vector<uint8_t> codes(static_cast<size_t>(slots * 64));
      std::vector<uint16_t> wide;
      for (uint8_t& c : codes) {
        c = static_cast<uint8_t>(rng.below(static_cast<uint64_t>(entries)));
        wide.push_back(c);
      }
      float portable[64], fast[5 * 64], plain[64];
      const std::vector<const uint8_t*> runs(5, codes.data());
      scan::fixed_portable(tables, runs.data(), 1, slots, portable);
      kernels::sum_by_code(lut.data(), 256, 1, wide.data(), 64, slots, 64, plain);
      for (const auto kernel : fixed_kernels()) {
        kernel(tables, runs.data(), 5, slots, fast);
        for (int n = 0; n < 5; ++n) CHECK(std::equal(portable, portable + 64, fast + 64 * n));
      }
      const double bound = 0.5 * static_cast<double>(slots) * tables.step + static_cast<double>(slots) * 0x1p-23 * 0.1;
      for (int t = 0; t < 64; ++t) {
        double exact = 0;
        for (int64_t s = 0; s < slots; ++s) exact += lut(s, codes[static_cast<size_t>(s * 64 + t)]);
        CHECK(std::abs(portable[t] - exact) <= bound);
        CHECK(std::abs(plain[t] - exact) <= static_cast<double>(slots) * 0x1p-23 * 0.1);
      }
    }
  Matrix<float> wide = random_matrix(16, 256, 18, 50.0);
  scan::FixedTables tables;
  scan::quantize(wide.data(), 16, 256, 256, tables);
  CHECK(tables.bound > scan::kScanLimit);
}

TEST_CASE("8-bit tables: the bound of each row holds, all kernels agree", "[table]") {
  for (const int64_t slots : {1, 16, 56, 256})
    for (const int64_t entries : {7, 16, 32, 33, 64, 128, 200, 256}) {
      CAPTURE(slots, entries);
      const Matrix<float> lut = random_matrix(slots, 256, 19, 0.3);
      scan::ByteTables tables;
      scan::quantize(lut.data(), slots, entries, 256, tables);
      CHECK(tables.bound > 0);
      CHECK(tables.bound <= 0.5001f * static_cast<float>(slots) * tables.step);
      Rng rng(5);
      std::vector<uint8_t> codes(static_cast<size_t>(5 * slots * 64));
      for (uint8_t& c : codes) c = static_cast<uint8_t>(rng.below(static_cast<uint64_t>(entries)));
      std::vector<const uint8_t*> runs;
      for (int64_t n = 0; n < 5; ++n) runs.push_back(codes.data() + n * slots * 64);
      float portable[5 * 64], fast[5 * 64];
      scan::bytes_portable(tables, runs.data(), 5, slots, portable);
      for (const auto kernel : bytes_kernels()) {
        kernel(tables, runs.data(), 5, slots, fast);
        CHECK(std::equal(portable, portable + 5 * 64, fast));
      }
      const double rounding = static_cast<double>(slots) * 0x1p-22;
      for (int64_t i = 0; i < 5 * 64; ++i) {
        double exact = 0;
        for (int64_t s = 0; s < slots; ++s)
          exact += lut(s, codes[static_cast<size_t>(i / 64 * slots * 64 + s * 64 + i % 64)]);
        CHECK(std::abs(portable[i] - exact) <= tables.bound + rounding);
      }
    }
  Matrix<float> endless = random_matrix(4, 256, 20);
  endless(2, 9) = std::numeric_limits<float>::infinity();
  scan::ByteTables tables;
  scan::FixedTables fixed;
  scan::quantize(endless.data(), 4, 256, 256, tables);
  scan::quantize(endless.data(), 4, 256, 256, fixed);
  CHECK(std::isinf(tables.bound));
  CHECK(std::isinf(fixed.bound));
}

TEST_CASE("cpu-table8 stays within its stated bound, and takes wider tables for loud rows", "[table]") {
  const auto reference = make_attention_backend("reference"), table = make_attention_backend("cpu-table8");
  CHECK(table->paths() == std::vector<std::string>{"cpu-table8"});
  int ran = 0;
  for (const Case& c : cases()) {
    CAPTURE(c.name);
    const CacheShape shape = make_shape(1, 4, 2, 64);
    const auto set = set_of(c, shape, 1);
    const Tokens x(shape, 330, 82);
    const CachePolicy policy = policy_of(4, {40, 32}, {33, 32});
    if (table->can(set->units()[0].codec->plan(), Role::kKey)) {
      CHECK_THROWS_AS(replay(set, policy, *table, x, 330), Error);
      continue;
    }
    ++ran;
    const double bound = tolerance(8, 64) + 6.0 * std::expm1(2.0 * scan::kByteScanLimit);
    const Replay want = replay(set, policy, *reference, x, 1);
    const double off = worst_difference(want.out, replay(set, policy, *table, x, 1).out);
    CHECK(off < bound);
    CHECK(off < 0.1);  // the usual error is far below the worst
  }
  CHECK(ran >= 8);
}

TEST_CASE("Token scales multiply the error of tables, so loud tokens take fp32", "[table]") {
  // Norms of 1,000 beside codewords of 1e-3: 16-bit tables would keep their bound before the scale, not after it.
  const auto reference = make_attention_backend("reference");
  const CacheShape shape = make_shape(1, 3, 1, 64);
  class Loud final : public Codec {
   public:
    explicit Loud(DecodePlan p) : inner_(std::move(p)) {}
    int channels() const override { return inner_.channels(); }
    const CodeLayout& layout() const override { return inner_.layout(); }
    RopePlacement rope() const override { return inner_.rope(); }
    TrainReport train(const TrainSet&, const Rng&) override { return {}; }
    DecodePlan plan(const PlanQuery& q) const override { return inner_.plan(q); }
    void save(ParameterWriter&) const override {}
    void load(const ParameterReader&) override {}
    void encode(ConstMatrix x, CodeBlock& out, const SequenceState* state) const override {
      inner_.encode(x, out, state);
      for (auto& side : out.sides)
        for (float& v : side) v *= 1024.0f;
    }

   private:
    PlanCodec inner_;
  };
  const auto set = make_set(shape, 1, [&](Role role, int channels) -> std::shared_ptr<const Codec> {
    DecodePlan p = empty_plan(channels);
    add_table(p, 8, 4);
    if (role == Role::kValue) return std::make_shared<PlanCodec>(p);
    auto quiet = std::make_shared<AlignedVector<float>>(*std::get<TableTerm>(p.terms[0]).codewords);
    for (float& v : *quiet) v *= 0x1p-10f;
    std::get<TableTerm>(p.terms[0]).codewords = quiet;
    add_token_scale(p, 1);
    return std::make_shared<Loud>(p);
  });
  const Tokens x(shape, 200, 83);
  const CachePolicy policy = policy_of(2, {16, 16}, {16, 16});
  const Replay want = replay(set, policy, *reference, x, 1);
  for (const auto& [name, limit] :
       {std::pair{"cpu-table", scan::kScanLimit}, std::pair{"cpu-table8", scan::kByteScanLimit}})
    CHECK(worst_difference(want.out, replay(set, policy, *make_attention_backend(name), x, 1).out) <
          tolerance(8, 64) + 6.0 * std::expm1(2.0 * limit));
}

TEST_CASE("auto names what ran, and its choice depends on the plan alone", "[table]") {
  const CacheShape shape = make_shape(1, 3, 1, 64);
  const Tokens x(shape, 400, 101);
  const CachePolicy policy = policy_of(4, {16, 16}, {16, 16});
  const auto pre = make_attention_backend("auto");
  replay(set_of(cases()[15], shape, 1), policy, *pre, x, 1);
  CHECK(pre->paths() == std::vector<std::string>{"cpu-reconstruct"});
  const auto post = make_attention_backend("auto");
  replay(set_of(cases()[0], shape, 1), policy, *post, x, 100);
  CHECK(post->paths() == std::vector<std::string>{"cpu-reconstruct"});
  // Single steps over 256-entry books pay for themselves at some hundreds of tokens, on processors with the kernel.
  const CacheShape wide = make_shape(1, 4, 1, 128);
  const Tokens many(wide, 2100, 103);
  const auto coarse = make_set(wide, 1, [](Role, int channels) {
    DecodePlan p = empty_plan(channels);
    add_table(p, 8, 8);
    return std::make_shared<PlanCodec>(p);
  });
  const auto mixed = make_attention_backend("auto"), reference = make_attention_backend("reference");
  CompressedCache fast(coarse, policy), slow(coarse, policy);
  KvSessionCpu fast_session(fast, *mixed), slow_session(slow, *reference);
  for (int64_t t = 0; t < 2100; t += t < 2096 ? 2096 : 1) {
    const int64_t n = t == 0 ? 2096 : 1;
    Matrix<float> a(n, many.q.cols), b(n, many.q.cols);
    fast_session.begin_block(n);
    fast_session.attend(0, many.q.view().slice_rows(t, n), many.k.view().slice_rows(t, n),
                        many.v.view().slice_rows(t, n), a);
    fast_session.end_block();
    slow_session.begin_block(n);
    if (n == 1)
      slow_session.attend(0, many.q.view().slice_rows(t, n), many.k.view().slice_rows(t, n),
                          many.v.view().slice_rows(t, n), b);
    else
      slow.append(0, many.k.view().slice_rows(t, n), many.v.view().slice_rows(t, n));
    slow_session.end_block();
    if (n == 1) CHECK(worst_difference(a, b) < tolerance(8, 128) + 2.0 * 6.0 * scan::kScanLimit);
    if (n == 2096) CHECK(mixed->paths() == std::vector<std::string>{"cpu-reconstruct"});
  }
  CHECK(mixed->paths() == std::vector<std::string>{"cpu-reconstruct", "cpu-table-sums"});
  CHECK_THROWS_AS(make_attention_backend("cpu-tabel"), Error);
  try {
    make_attention_backend("cuda-table");
  } catch (const Error& e) { CHECK(e.kind() == ErrorKind::kUnavailable); }
}

namespace {

struct Recorder final : AttentionTap {
  std::vector<Matrix<float>> seen;
  void on_probabilities(int, int, int64_t, ConstMatrix p) override {
    seen.emplace_back(p.rows, p.cols);
    for (int64_t i = 0; i < p.rows; ++i) std::copy_n(p.row(i), p.cols, seen.back().row(i));
  }
};

}  // namespace

TEST_CASE("Evicted tokens get no mass, and a tap sees the probabilities", "[evict]") {
  const CacheShape shape = make_shape(1, 2, 2, 64);
  const auto set = set_of(cases()[0], shape, 2);
  const Tokens x(shape, 330, 111);
  std::vector<std::vector<Matrix<float>>> all;
  std::vector<Matrix<float>> outs;
  for (const char* name : {"reference", "cpu-reconstruct", "cpu-table", "sums"}) {
    const auto backend = name == std::string("sums") ? make_tiled_backend(KeyScan::kFixed, ValueSums::kAlways)
                                                     : make_attention_backend(name);
    CompressedCache cache(set, policy_of(4, {16, 16}, {16, 16}));
    KvSessionCpu session(cache, *backend);
    Matrix<float> out(300, shape.q_heads * 64), last(30, shape.q_heads * 64);
    session.begin_block(300);
    session.attend(0, x.q.view().slice_rows(0, 300), x.k.view().slice_rows(0, 300), x.v.view().slice_rows(0, 300), out);
    session.end_block();
    std::vector<int64_t> gone = {0, 2, 290};
    for (int64_t t = 68; t < 132; ++t) gone.push_back(t);  // a whole page
    cache.evict(0, 0, gone);
    cache.evict(0, 1, std::span<const int64_t>(gone).subspan(3));
    Recorder tap;
    session.set_tap(&tap);
    session.begin_block(30);
    session.attend(0, x.q.view().slice_rows(300, 30), x.k.view().slice_rows(300, 30), x.v.view().slice_rows(300, 30),
                   last);
    session.end_block();
    REQUIRE(tap.seen.size() == 4);
    for (int64_t i = 0; i < 30; ++i) {
      double sum = 0;
      for (int64_t t = 0; t < 330; ++t) sum += tap.seen[0](i, t);
      CHECK(sum == Approx(1.0).epsilon(1e-5));
      for (const int64_t t : gone) CHECK(tap.seen[0](i, t) == 0);
      CHECK(tap.seen[2](i, 0) > 0);
      for (int64_t t = 300 + i + 1; t < 330; ++t) CHECK(tap.seen[3](i, t) == 0);
    }
    all.push_back(std::move(tap.seen));
    outs.push_back(std::move(last));
  }
  for (size_t b : {1, 2, 3}) {
    const double bound = tolerance(8, 64) + (b >= 2 ? 12.0 * scan::kScanLimit : 0.0);
    CHECK(worst_difference(outs[0], outs[b]) < bound);
    for (size_t h = 0; h < 4; ++h) CHECK(worst_difference(all[0][h], all[b][h]) < bound);
  }
}

TEST_CASE("Attention to what eviction left: every form of codes, every path, alike in steps and blocks", "[evict]") {
  const CacheShape shape = make_shape(1, 3, 2, 64);
  for (const Case& c : cases())
    for (const int heads : {1, 2}) {
      CAPTURE(c.name, heads);
      const auto set = set_of(c, shape, heads);
      const Tokens x(shape, 500, 191);
      const CachePolicy policy = policy_of(4, {32, 32}, {64, 32});
      std::optional<Matrix<float>> reference;
      std::optional<std::vector<double>> reference_mass;
      struct Way {
        std::string name;
        KeyScan scan;
        ValueSums sums;
      };
      for (const Way& way : {Way{"reference", {}, {}}, Way{"cpu-reconstruct", KeyScan::kNone, ValueSums::kNever},
                             Way{"cpu-table", KeyScan::kFixed, ValueSums::kWherePays},
                             Way{"sums", KeyScan::kNone, ValueSums::kAlways}}) {
        CAPTURE(way.name);
        const DecodePlan& keys = set->units()[0].codec->plan();
        const DecodePlan& values = set->units().back().codec->plan();
        if (way.scan != KeyScan::kNone && table_scan_reason(keys)) continue;
        if (way.sums == ValueSums::kAlways && value_sum_reason(values)) continue;
        const auto run = [&](int64_t block, std::vector<double>& received) {
          const auto backend =
              way.name == "reference" ? make_attention_backend("reference") : make_tiled_backend(way.scan, way.sums);
          CompressedCache cache(set, policy);
          Matrix<float> q = x.q, out(500, x.q.cols);
          std::vector<int32_t> positions(500);
          std::iota(positions.begin(), positions.end(), 0);
          rope_apply(RopeTable(shape.rope), positions.data(), q);
          received.assign(500, 0.0);
          for (int64_t t = 0; t < 500;) {
            const int64_t n = std::min(block, 500 - t) <= 250 - t || t >= 250 ? std::min(block, 500 - t) : 250 - t;
            cache.begin_block(n);
            cache.append(0, x.k.view().slice_rows(t, n), x.v.view().slice_rows(t, n));
            const std::vector<int32_t> seen[2] = {CacheView(cache).seen(0, 0), CacheView(cache).seen(0, 1)};
            std::vector<double> columns[2] = {std::vector<double>(seen[0].size()), std::vector<double>(seen[1].size())};
            MassRequest mass{0, 500, {columns[0], columns[1]}};
            backend->attend(cache, 0, q.view().slice_rows(t, n), MutMatrix(out).slice_rows(t, n), nullptr, nullptr,
                            &mass);
            for (size_t i = 0; i < seen[0].size(); ++i) received[static_cast<size_t>(seen[0][i])] += columns[0][i];
            cache.end_block();
            t += n;
            if (t != 250) continue;
            // Sinks, codes, what spans the boundary, the exact window; both heads, then one of them.
            std::vector<int64_t> both = {1, 247}, one = {0, 2, 248};
            for (int64_t p = 5; p < 240; ++p) {
              if (p % 64 > 20 && p % 64 < 60) both.push_back(p);
              if (p % 7 == 3) one.push_back(p);
            }
            cache.evict(0, 0, both);
            cache.evict(0, 1, both);
            cache.evict(0, 0, one);
          }
          return out;
        };
        std::vector<double> mass, other;
        const Matrix<float> whole = run(500, mass);
        if (!reference) {
          reference = whole;
          reference_mass = mass;
        }
        const double bound = tolerance(8, 64) + (way.scan != KeyScan::kNone ? 12.0 * scan::kScanLimit : 0.0);
        CHECK(worst_difference(*reference, whole) < bound);
        for (size_t t = 0; t < 500; ++t) REQUIRE(mass[t] == Approx((*reference_mass)[t]).margin(500 * bound));
        for (const int64_t block : {1, 33}) {
          if (block == 1 && way.name == "reference") continue;
          CHECK((run(block, other).storage == whole.storage));
        }
      }
    }
}

TEST_CASE("The mass of tokens: what a tap's probabilities sum to, alike in steps and blocks", "[evict]") {
  const CacheShape shape = make_shape(1, 3, 2, 64);
  const Tokens x(shape, 420, 171);
  struct Way {
    std::string name;
    KeyScan scan;
    ValueSums sums;
  };
  for (const Way& way :
       {Way{"reference", {}, {}}, Way{"cpu-reconstruct", KeyScan::kNone, ValueSums::kNever},
        Way{"cpu-table", KeyScan::kFixed, ValueSums::kWherePays},
        Way{"cpu-table8", KeyScan::kBytes, ValueSums::kWherePays}, Way{"sums", KeyScan::kFixed, ValueSums::kAlways}})
    for (const bool drops : {false, true}) {
      CAPTURE(way.name, drops);
      const auto make = [&] {
        return way.name == "reference" ? make_attention_backend("reference") : make_tiled_backend(way.scan, way.sums);
      };
      CachePolicy policy = policy_of(4, {32, 16}, {32, 16});
      policy.drops = drops;
      // Queries [from, to) alone count, whatever blocks they come in.
      constexpr int64_t kFrom = 130, kTo = 391;
      const auto run = [&](int64_t block, AttentionTap* tap) {
        std::vector<std::vector<double>> received(2, std::vector<double>(420, 0.0));
        const auto backend = make();
        CompressedCache cache(set_of(cases()[0], shape, 2), policy);
        KvSessionCpu rotates(cache, *backend);
        Matrix<float> q = x.q, out(420, x.q.cols);
        std::vector<int32_t> positions(420);
        std::iota(positions.begin(), positions.end(), 0);
        rope_apply(RopeTable(shape.rope), positions.data(), q);
        for (int64_t t = 0; t < 420; t += block) {
          const int64_t n = std::min(block, 420 - t);
          cache.begin_block(n);
          cache.append(0, x.k.view().slice_rows(t, n), x.v.view().slice_rows(t, n));
          MassRequest mass{kFrom, kTo, {received[0], received[1]}};
          backend->attend(cache, 0, q.view().slice_rows(t, n), MutMatrix(out).slice_rows(t, n), nullptr, tap, &mass);
          cache.end_block();
        }
        return received;
      };
      Recorder tap;
      const auto whole = run(420, &tap);
      REQUIRE(tap.seen.size() == 6);
      for (size_t h = 0; h < 2; ++h)
        for (int64_t t = 0; t < 420; ++t) {
          double sum = 0;
          for (size_t g = 0; g < 3; ++g)
            for (int64_t i = kFrom; i < kTo; ++i) sum += tap.seen[3 * h + g](i, t);
          REQUIRE(whole[h][static_cast<size_t>(t)] == Approx(sum).margin(1e-4));
        }
      for (const int64_t block : {1, 37, 256}) CHECK(run(block, nullptr) == whole);
    }
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
