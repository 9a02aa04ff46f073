// A sequence: one owner of memory, cache, backend and session.

#include "attention/feed.h"
#include "cache/model.h"
#include "support/catch.h"
#include "support/dummy_codecs.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

std::shared_ptr<const CodecSet> tables(const CacheShape& shape) {
  return make_set(shape, 1, [](Role, int channels) {
    DecodePlan p = empty_plan(channels);
    add_table(p, 4, 4);
    return std::make_shared<PlanCodec>(p);
  });
}

constexpr int64_t kTokens = 150;
const CachePolicy kPolicy{.sinks = 4, .k = {16, 16}, .v = {16, 16}};

}  // namespace

TEST_CASE("a sequence holds its ledger to its allocator and to the formula of as many tokens", "[sequence]") {
  const CacheShape shape = make_shape(2, 2, 2, 16);
  const auto set = tables(shape);
  Sequence sequence(set, kPolicy, "cpu-table");
  CHECK(sequence.coded_share() == 0);
  feed(sequence, Tokens(shape, kTokens, 1), 0, kTokens);
  CHECK(sequence.memory().live() == sequence.cache().bytes().total_sequence() + sequence.session().held_bytes());
  CHECK(sequence.allocated() == sequence.bytes().total_sequence());
  CHECK(sequence.bytes().workspace > sequence.session().held_bytes());
  CHECK(sequence.coded_share() > 0);
  CHECK(sequence.path() == "cpu-table-sums");
  sequence.check_ledger("c");
  sequence.check_ledger(ledger_at(*set, kPolicy, kTokens), "c");
  std::string error;
  try {
    sequence.check_ledger(ledger_at(*set, kPolicy, 2 * kTokens), "c at 300 tokens");
  } catch (const Error& e) { error = e.what(); }
  CHECK(error.starts_with("c at 300 tokens: the formula says "));
  CHECK_THROWS_AS(Sequence(set, kPolicy, "cpu-tabel"), Error);
}

TEST_CASE("codecs are fitted to the queries that a session attends with, in blocks and in steps", "[sequence]") {
  const CacheShape shape = make_shape(2, 3, 2, 16);
  const auto set_of = [&](bool queries) {
    return dummy_codec_set(shape, RopePlacement::kPre, 1, [=](const UnitShape& unit) {
      return std::make_unique<PromptDummy>(unit, false, FitNeeds{60, queries});
    });
  };
  const auto with = set_of(true), without = set_of(false);
  const Tokens x(shape, kTokens, 1);
  const auto bias_of = [&](const std::shared_ptr<const CodecSet>& set, int64_t block) {
    Sequence sequence(set, kPolicy, "auto");
    for (int64_t t = 0; t < kTokens; t += block) feed(sequence, x, t, std::min(block, kTokens - t));
    sequence.check_ledger("fitted");
    std::vector<std::vector<float>> biases;
    for (size_t u = 0; u < set->units().size(); ++u)
      biases.push_back(CacheView(sequence.cache()).form(u).plan.outer_bias);
    return biases;
  };
  const auto biases = bias_of(with, kTokens);
  for (const auto& bias : biases) CHECK(bias.size() == 16);
  CHECK(bias_of(with, 1) == biases);
  CHECK(bias_of(with, 64) == biases);
  CHECK_FALSE(bias_of(without, kTokens) == biases);
}

TEST_CASE("a sequence that starts again is as a new one, on the same backend", "[sequence]") {
  const CacheShape shape = make_shape(2, 2, 2, 16);
  const auto set = tables(shape);
  const Tokens x(shape, kTokens, 11), y(shape, kTokens, 21);
  Sequence used(set, kPolicy, "auto"), fresh(set, kPolicy, "auto");
  feed(used, x, 0, kTokens);
  const std::string before = used.path();
  used.restart();
  CHECK(used.cache().length() == 0);
  CHECK(used.session().stats().total_mass == 0);
  CHECK(used.path() == before);
  CHECK(feed(used, y, 0, kTokens).storage == feed(fresh, y, 0, kTokens).storage);
  CHECK(used.memory().live() == fresh.memory().live());
  used.check_ledger("used");
}

TEST_CASE("a sequence of a bare shape keeps everything exactly", "[sequence]") {
  const CacheShape shape = make_shape(2, 2, 2, 16);
  Sequence bare(shape, kPolicy, "cpu-reconstruct");  // a policy that codes has nothing to code with
  const auto exact = std::make_shared<const CacheModel>(exact_codec_set(shape));
  Sequence other(exact, CachePolicy::exact(), "cpu-reconstruct");
  const Tokens x(shape, kTokens, 31);
  CHECK(feed(bare, x, 0, kTokens).storage == feed(other, x, 0, kTokens).storage);
  CHECK(bare.coded_share() == 0);
  bare.check_ledger("bare");
}

TEST_CASE("sequences that share a model and a backend get what each gets alone", "[sequence]") {
  const CacheShape shape = make_shape(2, 2, 2, 16);
  const auto model = std::make_shared<const CacheModel>(tables(shape));
  for (const char* name : {"reference", "cpu-reconstruct", "cpu-table", "auto"}) {
    CAPTURE(name);
    const std::shared_ptr<AttentionBackend> backend = make_attention_backend(name);
    std::vector<Sequence> sequences;
    for (int i = 0; i < 3; ++i) sequences.emplace_back(model, kPolicy, backend);
    for (int64_t t = 0; t < 40; t += 8)
      for (uint64_t i = 0; i < 3; ++i) {
        const Tokens x(shape, 40, 40 + 10 * i);
        const Matrix<float> out = feed(sequences[i], x, t, 8);
        Sequence alone(model, kPolicy, name);
        Matrix<float> want;
        for (int64_t s = 0; s <= t; s += 8) want = feed(alone, x, s, 8);
        CHECK(out.storage == want.storage);
      }
  }
}
