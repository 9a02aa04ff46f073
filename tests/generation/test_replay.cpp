// Replay over a model whose logits are made up.
#include "generation/replay.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "codec/build.h"
#include "core/error.h"
#include "support/catch.h"

using namespace vqkv;

namespace {

struct FakeTokenizer final : Tokenizer {
  std::string kind() const override { return "fake"; }
  int32_t size() const override { return 32; }
  std::vector<int32_t> encode(std::string_view, bool) const override { return {}; }
  std::string decode(const std::vector<int32_t>&, bool) const override { return ""; }
  std::string piece(int32_t) const override { return "x"; }
};

// Attends alike to all that is visible; a token's value is one in its own channel, and the output is the logits.
class MeanRuntime final : public ModelRuntime {
 public:
  MeanRuntime() {
    facts_.name = "mean";
    facts_.layers = facts_.q_heads = facts_.kv_heads = 1;
    facts_.head_dim = facts_.vocab = 16;
    facts_.context_length = 256;
    facts_.rope = RopeFacts::plain(16, 16, 100.0);
  }
  const ModelFacts& facts() const override { return facts_; }
  std::string weights() const override { return "none"; }
  const Tokenizer& tokenizer() const override { return tokenizer_; }
  ConstMatrix output_weight(int) const override { return {}; }
  void forward_batch(std::span<const SequenceBlock> batch, LogitRows, MutMatrix logits) override {
    REQUIRE(batch.size() == 1);
    const auto& [tokens, session, visibility, tap] = batch[0];
    KvSession& kv = *session;
    const auto n = static_cast<int64_t>(tokens.size());
    const Matrix<float> zeros(n, 16);
    Matrix<float> values(n, 16), out(n, 16);
    for (int64_t t = 0; t < n; ++t) values(t, tokens[static_cast<size_t>(t)]) = 1;
    kv.begin_block(n, visibility);
    kv.attend(0, zeros, zeros, values, out);
    kv.end_block();
    for (int64_t r = 0; r < logits.rows; ++r) std::copy_n(out.row(r), 16, logits.row(r));
  }

 private:
  ModelFacts facts_;
  FakeTokenizer tokenizer_;
};

struct NoRows final : TrainSource {
  TrainData unit(const UnitShape&, const TrainNeeds&) const override { fail_internal("nothing learns here"); }
};

// Zeros everywhere but one logit of one position, in caches that code.
class FakeRuntime final : public ModelRuntime {
 public:
  explicit FakeRuntime(float bad_logit) : bad(bad_logit) {
    facts_.name = "fake";
    facts_.layers = 1;
    facts_.q_heads = facts_.kv_heads = 1;
    facts_.head_dim = 16;
    facts_.vocab = 32;
    facts_.context_length = 128;
    facts_.rope = RopeFacts::plain(16, 16, 100.0);
  }
  const ModelFacts& facts() const override { return facts_; }
  std::string weights() const override { return "none"; }
  const Tokenizer& tokenizer() const override { return tokenizer_; }
  ConstMatrix output_weight(int) const override { return {}; }
  void forward_batch(std::span<const SequenceBlock> batch, LogitRows, MutMatrix logits) override {
    REQUIRE(batch.size() == 1);
    const auto& [tokens, session, visibility, tap] = batch[0];
    KvSession& kv = *session;
    const auto n = static_cast<int64_t>(tokens.size());
    const int64_t first = kv.cache().length();
    kv.begin_block(n, visibility);
    const Matrix<float> zeros(n, 16);
    Matrix<float> out(n, 16);
    kv.attend(0, zeros, zeros, zeros, out);
    kv.end_block();
    for (int64_t r = 0; r < n; ++r)
      for (int64_t v = 0; v < logits.cols; ++v)
        logits(r, v) = first + r == 40 && v == 5 && kv.cache().policy().codes ? bad : 0;
  }
  float bad;

 private:
  ModelFacts facts_;
  FakeTokenizer tokenizer_;
};

}  // namespace

TEST_CASE("a logit that is not finite ends a replay with the candidate, the window and the position", "[replay]") {
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                          -std::numeric_limits<float>::infinity()}) {
    FakeRuntime model(bad);
    const CacheShape shape = model.facts().cache_shape();
    const ReplayCandidate candidate{
        .label = "two bits",
        .codecs =
            train_codec_set(resolve_codec({{"name", "rtn"}, {"bits", 2}, {"group", 16}}, shape), shape, NoRows(), {}),
        .policy = {}};
    const ReplayText text{"t", std::vector<int32_t>(128, 5)};
    std::string error = "no error";
    try {
      replay(model, std::span(&text, 1), std::span(&candidate, 1), {.context = 64});
    } catch (const Error& e) { error = e.what(); }
    CHECK(error ==
          fmt::format("window 0: two bits: position 41: the logit of token 5 is {}; logits must be finite", bad));
  }
}

TEST_CASE("an exact prompt under the policy streaming: its last token sees all of it, later ones sinks and window",
          "[replay]") {
  MeanRuntime model;
  const CacheShape shape = model.facts().cache_shape();
  const CachePolicy policy =
      CachePolicy::from_json({{"sinks", 4}, {"window", 8}, {"flush", 4}, {"policy", "streaming"}});
  REQUIRE(policy.drops);
  const auto candidate = [&](const char* label, ReplayMode mode, const CachePolicy& p) {
    return ReplayCandidate{.label = label, .codecs = exact_codec_set(shape), .policy = p, .mode = mode, .block = 16};
  };
  const ReplayCandidate candidates[] = {candidate("exact prompt", ReplayMode::kPrefillExact, policy),
                                        candidate("forced", ReplayMode::kForced, policy),
                                        candidate("exact", ReplayMode::kForced, CachePolicy::exact())};
  constexpr int64_t kContext = 160, kPrompt = 100;
  ReplayText text{"t", {}};
  for (int64_t t = 0; t < kContext; ++t) text.tokens.push_back(static_cast<int32_t>((t * t / 7 + t) % 16));
  const ReplayResult r =
      replay(model, std::span(&text, 1), candidates, {.context = kContext, .prompt = kPrompt, .block = 16});
  REQUIRE(r.position.size() == kContext - kPrompt);

  // The row at `i` sees every token up to its own but the dropped ones, all alike.
  const auto nll = [&](int64_t i, int64_t dropped_end) {
    double logits[16] = {}, sum = 0;
    int64_t seen = 0;
    for (int64_t t = 0; t <= i; ++t)
      if (t < policy.sinks || t >= dropped_end) logits[text.tokens[static_cast<size_t>(t)]] += 1, ++seen;
    for (double& x : logits) sum += std::exp(x /= static_cast<double>(seen));
    return std::log(sum) - logits[text.tokens[static_cast<size_t>(i) + 1]];
  };
  const ReplayTrack &prompt = r.tracks[0], &forced = r.tracks[1];
  for (size_t k = 0; k < r.position.size(); ++k) {
    const int64_t row = r.position[k] - 1;  // which predicts this position
    INFO("row " << row);
    const int64_t dropped = policy.coded_end(Role::kKey, row);
    CHECK(forced.nll[k] == Approx(nll(row, dropped)).margin(1e-5));
    CHECK(prompt.nll[k] == Approx(nll(row, row < kPrompt ? 0 : dropped)).margin(1e-5));
    CHECK(r.tracks[2].nll[k] == Approx(nll(row, 0)).margin(1e-5));
  }
  CHECK(prompt.kld[0] == 0);
  CHECK(forced.kld[0] > 1e-4);
  // What the prompt held beyond sinks and window is given back.
  CHECK(prompt.bytes.to_json() == forced.bytes.to_json());
  CHECK(prompt.bytes.total_sequence() < r.tracks[2].bytes.total_sequence() / 2);
  CHECK(prompt.peak_cache_bytes > forced.peak_cache_bytes);
}
