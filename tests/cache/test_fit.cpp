// Parameters fitted to a prompt: what they are fitted to, when, and what they cost.
#include <numeric>

#include "cache/cache_support.h"
#include "cache/view.h"
#include "codec/codec_set.h"
#include "core/rope.h"
#include "support/catch.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

// Scales by the largest key of the prompt: one f32 a sequence. Keeps what it was fitted to.
class PromptCodec final : public Codec {
 public:
  struct State final : SequenceState {
    float largest = 1;
    int64_t tokens = 0;
    std::vector<float> queries;
    int64_t bytes() const override { return 4; }
  };
  PromptCodec(int channels, FitNeeds needs) : needs_(needs) {
    plan_ = test::empty_plan(channels);
    std::vector<int32_t> all;
    for (int c = 0; c < channels; ++c) all.push_back(c);
    add_dense(plan_, all, DType::kBF16);
  }
  int channels() const override { return plan_.channels; }
  const CodeLayout& layout() const override { return plan_.layout; }
  RopePlacement rope() const override { return RopePlacement::kPost; }
  TrainReport train(const TrainSet&, const Rng&) override { return {}; }
  FitNeeds fit_needs() const override { return needs_; }
  std::unique_ptr<SequenceState> fit(ConstMatrix k, ConstMatrix, ConstMatrix q) const override {
    auto s = std::make_unique<State>();
    s->tokens = k.rows;
    for (int64_t t = 0; t < k.rows; ++t)
      for (int64_t c = 0; c < k.cols; ++c) s->largest = std::max(s->largest, std::abs(k(t, c)));
    for (int64_t r = 0; r < q.rows; ++r) s->queries.insert(s->queries.end(), q.row(r), q.row(r) + q.cols);
    return s;
  }
  void encode(ConstMatrix x, CodeBlock& out, const SequenceState* state) const override {
    REQUIRE(state != nullptr);
    out.resize(plan_.layout, x.rows);
    for (int64_t i = 0; i < x.size(); ++i)
      out.sides[0][static_cast<size_t>(i)] = round_to_bf16(x.data[i] / static_cast<const State*>(state)->largest);
  }
  DecodePlan plan(const PlanQuery& query) const override {
    DecodePlan p = plan_;
    if (query.state)
      p.map = DiagonalMap{
          std::vector<float>(static_cast<size_t>(p.channels), static_cast<const State*>(query.state)->largest)};
    return p;
  }
  void save(ParameterWriter&) const override {}
  void load(const ParameterReader&) override {}

 private:
  FitNeeds needs_;
  DecodePlan plan_;
};

std::shared_ptr<const CodecSet> prompt_set(const CacheShape& shape, FitNeeds needs) {
  return make_set(shape, 1, [&](Role, int channels) { return std::make_shared<PromptCodec>(channels, needs); });
}

const PromptCodec::State* state_of(const CompressedCache& cache, size_t unit) {
  return dynamic_cast<const PromptCodec::State*>(CacheView(cache).state(unit));
}

}  // namespace

TEST_CASE("Parameters fitted to the prompt: once, alike in steps and blocks, counted as side data", "[cache]") {
  const CacheShape shape = make_shape(1, 2, 2, 16);
  const Tokens x(shape, 200, 11);
  const RopeTable rope(shape.rope);
  std::vector<int32_t> positions(200);
  std::iota(positions.begin(), positions.end(), 0);
  Matrix<float> exact = x.k, queries = x.q;
  rope_apply(rope, positions.data(), exact);
  rope_apply(rope, positions.data(), queries);
  struct Case {
    CachePolicy policy;
    FitNeeds needs;
    int64_t fitted;  // tokens
  };
  // What is there when the first token is coded, or as much as the codec asks for: never the first token alone.
  for (const Case& c :
       {Case{policy_of(4, {32, 16}, {40, 16}), {2, false}, 4 + 32 + 16 - 1},
        Case{policy_of(4, {32, 16}, {40, 16}), {2, true}, 4 + 32 + 16 - 1},
        Case{policy_of(4, {32, 16}, {40, 16}), {90, true}, 90}, Case{policy_of(0, {1, 1}, {1, 1}), {24, true}, 24},
        Case{policy_of(4, {0, 1}, {0, 1}), {24, true}, 24},
        // All of a prompt that is said to end, even where what is coded first holds more.
        Case{with_prompt(policy_of(4, {32, 16}, {40, 16}), 90), {2, true}, 90},
        Case{with_prompt(policy_of(4, {0, 1}, {0, 1}), 24, false), {24, true}, 24}})
    for (const int64_t step : {1, 7, 200, -7}) {  // -7: blocks of an exact prompt
      const int64_t block = std::abs(step);
      CAPTURE(c.policy.sinks, c.fitted, c.needs.queries, step);
      const auto set = prompt_set(shape, c.needs);
      CountingResource memory;
      CompressedCache cache(set, c.policy, &memory);
      for (int64_t t = 0; t < 200; t += block) {
        feed(cache, x, t, std::min(block, 200 - t), step < 0 ? Visibility::kExactPrefill : Visibility::kReplay);
        REQUIRE(cache.bytes().total_sequence() == memory.live());
        const bool fits = step > 0 && cache.length() >= c.fitted;
        REQUIRE(cache.fitted() == fits);
        REQUIRE((CacheView(cache).coded_end(0, Role::kKey) > c.policy.sinks) == fits);
        if (!fits && cache.length() < c.fitted) REQUIRE(same(cache.bytes(), ledger_at(*set, c.policy, cache.length())));
      }
      cache.end_exact_prefill();
      REQUIRE(cache.bytes().total_sequence() == memory.live());
      const auto* state = state_of(cache, 0);
      REQUIRE(state);
      CHECK(state->tokens == c.fitted);
      for (size_t u = 0; u < 4; ++u) {
        const std::vector<float>& q = state_of(cache, u)->queries;
        REQUIRE(q.size() == static_cast<size_t>(c.needs.queries ? c.fitted * 2 * 16 : 0));
        bool given = true;
        for (int64_t i = 0; i < static_cast<int64_t>(q.size()); ++i)
          given = given && q[static_cast<size_t>(i)] == queries(i / 32, static_cast<int64_t>(u % 2) * 32 + i % 32);
        CHECK(given);
      }
      const int64_t coded = CacheView(cache).coded_end(0, Role::kKey) - c.policy.sinks,
                    coded_v = CacheView(cache).coded_end(0, Role::kValue) - c.policy.sinks;
      CHECK(cache.bytes().side == 4 * 4 + (coded + coded_v) * 2 * 16 * 2);
      Matrix<float> x_hat(coded, 16);
      decode_plan(CacheView(cache).form(0).plan, CacheView(cache).fetch_codes(0), x_hat);
      for (int64_t t = 0; t < coded; ++t)
        for (int ch = 0; ch < 16; ++ch)
          REQUIRE(x_hat(t, ch) == Approx(exact(t + c.policy.sinks, ch)).margin(state->largest * 0.005));
    }
}

TEST_CASE("What is fitted to a prompt: no query of a draft, no rollback behind it, and what can't be fitted is refused",
          "[cache]") {
  const CacheShape shape = make_shape(2, 2, 1, 16);
  const Tokens x(shape, 200, 12), draft(shape, 200, 13);
  const CachePolicy policy = policy_of(4, {32, 16}, {32, 16});
  const auto set = prompt_set(shape, {70, true});
  CountingResource memory;
  CompressedCache cache(set, policy, &memory), straight(set, policy);
  feed(cache, x, 0, 40);
  feed(cache, draft, 40, 26);
  cache.truncate(40);
  CHECK(cache.bytes().total_sequence() == memory.live());
  CHECK(same(cache.bytes(), ledger_at(*set, policy, 40)));
  feed(cache, x, 40, 35);
  feed(straight, x, 0, 75);
  CHECK(cache.bytes().total_sequence() == memory.live());
  for (size_t u = 0; u < 4; ++u) CHECK(state_of(cache, u)->queries == state_of(straight, u)->queries);
  // Token 68 is exact still, but part of what was fitted to.
  CHECK_NOTHROW(cache.truncate(70));
  CHECK_THROWS_WITH(cache.truncate(68),
                    Catch::Contains("truncate to 68 tokens: parameters were fitted to the first 70"));

  CompressedCache blind(set, policy);
  blind.begin_block(40);
  CHECK_THROWS_WITH(blind.append(0, x.k.view().slice_rows(0, 40), x.v.view().slice_rows(0, 40)),
                    Catch::Contains("fitted to the queries of its prompt"));
  CompressedCache fake(set, policy);
  CHECK_THROWS_WITH(feed(fake, x, 0, 69, Visibility::kAllCoded),
                    Catch::Contains("fake-quant codes every token of 69; a codec fits its parameters to 70 tokens"));
  CHECK_THROWS_WITH(
      CompressedCache(set, with_prompt(policy, 69)),
      Catch::Contains("cache.prompt: codec 'plan' fits its parameters to 70 tokens of a prompt at least, not "
                      "to 69"));
  CompressedCache unsaid(prompt_set(shape, {}), policy);
  CHECK_THROWS_WITH(feed(unsaid, x, 0, 100), Catch::Contains("Codec::fit_needs"));
}
