// Keys scored by table and values summed by code: stated bounds, and what runs where.
#include <algorithm>
#include <limits>

#include "attention/backends_cpu.h"
#include "attention/kernels_cpu.h"
#include "attention/plan_cases.h"
#include "attention/scan_cpu.h"
#include "attention/session_cpu.h"
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

}  // namespace

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

TEST_CASE("cpu-table scans signs, and says why not beside outlier channels or under a scale of their own", "[table]") {
  const auto table = make_attention_backend("cpu-table");
  const auto reason = [&](int outliers, bool scaled) {
    DecodePlan p = empty_plan(64, 8);
    add_signs(p, 32, 64, outliers, scaled);
    return table->can(p, Role::kKey).value_or("");
  };
  CHECK(reason(0, false) == "");
  CHECK_THAT(reason(0, true), Catch::Contains("a scale of their own"));
  CHECK_THAT(reason(3, true), Catch::Contains("set channels apart"));
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
      const bool can = !code_domain_reason(units[units.size() - 1].codec->plan());
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
      if (code_domain_reason(plan) || summed->can(set->units()[0].codec->plan(), Role::kKey)) continue;
      const int64_t f = c.block_tokens;
      for (const CachePolicy& policy : {policy_of(0, {1, 32}, {f == 1 ? 33 : 32, f}), policy_of(5, {64, 32}, {0, f})}) {
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
