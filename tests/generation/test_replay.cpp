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

// One layer and one head of 16 channels, whose every block is run by `run`.
class OneHead : public ModelRuntime {
 public:
  OneHead(int32_t vocab, int64_t context) {
    facts_.name = "one head";
    facts_.layers = facts_.q_heads = facts_.kv_heads = 1;
    facts_.head_dim = 16;
    facts_.vocab = vocab;
    facts_.context_length = context;
    facts_.rope = RopeFacts::plain(16, 16, 100.0);
  }
  const ModelFacts& facts() const override { return facts_; }
  std::string weights() const override { return "none"; }
  const Tokenizer& tokenizer() const override { return tokenizer_; }
  ConstMatrix output_weight(int) const override { return {}; }
  void forward_batch(std::span<const SequenceBlock> batch, LogitRows, MutMatrix logits) override {
    REQUIRE(batch.size() == 1);
    const auto& [tokens, kv, visibility, tap] = batch[0];
    const auto n = static_cast<int64_t>(tokens.size());
    const int64_t first = kv->cache().length();
    const Matrix<float> zeros(n, 16);
    Matrix<float> out(n, 16);
    kv->begin_block(n, visibility);
    kv->attend(0, zeros, zeros, values(tokens), out);
    kv->end_block();
    fill(first, kv->cache().policy(), out, logits);
  }
  // (tokens, 16) values of the tokens, and logits of the queries from position `first` on out of what they attended to.
  virtual Matrix<float> values(std::span<const int32_t> tokens) const = 0;
  virtual void fill(int64_t first, const CachePolicy& policy, const Matrix<float>& attended,
                    MutMatrix logits) const = 0;

 private:
  ModelFacts facts_;
  FakeTokenizer tokenizer_;
};

// Attends alike to all that is visible; a token's value is one in its own channel, and the output is the logits.
struct MeanRuntime final : OneHead {
  explicit MeanRuntime(int64_t context = 256) : OneHead(16, context) {}
  Matrix<float> values(std::span<const int32_t> tokens) const override {
    Matrix<float> v(static_cast<int64_t>(tokens.size()), 16);
    for (int64_t t = 0; t < v.rows; ++t) v(t, tokens[static_cast<size_t>(t)]) = 1;
    return v;
  }
  void fill(int64_t, const CachePolicy&, const Matrix<float>& attended, MutMatrix logits) const override {
    for (int64_t r = 0; r < logits.rows; ++r) std::copy_n(attended.row(r), 16, logits.row(r));
  }
};

// Zeros everywhere but one logit of one position, in caches that code.
struct LogitRuntime final : OneHead {
  explicit LogitRuntime(float bad_logit) : OneHead(32, 128), bad(bad_logit) {}
  Matrix<float> values(std::span<const int32_t> tokens) const override {
    return Matrix<float>(static_cast<int64_t>(tokens.size()), 16);
  }
  void fill(int64_t first, const CachePolicy& policy, const Matrix<float>&, MutMatrix logits) const override {
    for (int64_t r = 0; r < logits.rows; ++r)
      for (int64_t v = 0; v < logits.cols; ++v) logits(r, v) = first + r == 40 && v == 5 && policy.codes ? bad : 0;
  }
  float bad;
};

struct NoRows final : TrainSource {
  TrainData unit(const UnitShape&, const TrainNeeds&) const override { fail_internal("nothing learns here"); }
};

}  // namespace

TEST_CASE("a logit that is not finite ends a replay with the candidate, the window and the position", "[replay]") {
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                          -std::numeric_limits<float>::infinity()}) {
    LogitRuntime model(bad);
    const CacheShape shape = model.facts().cache_shape();
    ReplayCandidate candidate;
    candidate.label = "two bits";
    candidate.codecs =
        train_codec_set(resolve_codec({{"name", "rtn"}, {"bits", 2}, {"group", 16}}, shape), shape, NoRows(), {});
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

TEST_CASE("fake-quant waits for a prompt that is longer than a stretch, and refuses a window that is shorter",
          "[replay]") {
  MeanRuntime model(1024);
  const CacheShape shape = model.facts().cache_shape();
  const auto codecs =
      train_codec_set(resolve_codec({{"name", "rtn"}, {"bits", 2}, {"group", 16}}, shape), shape, NoRows(), {});
  ReplayText text{"t", {}};
  for (int64_t t = 0; t < 600; ++t) text.tokens.push_back(static_cast<int32_t>((t * t / 7 + t) % 16));
  const auto run = [&](const Json& cache, int64_t context) {
    const ReplayCandidate candidate{
        .label = "two bits", .codecs = codecs, .policy = CachePolicy::from_json(cache), .mode = ReplayMode::kFakeQuant};
    return replay(model, std::span(&text, 1), std::span(&candidate, 1), {.context = context}).tracks.at(0);
  };
  const Json prompt = {{"prompt", 400}};
  // What fits nothing to its prompt gives the same with and without one.
  const ReplayTrack with = run(prompt, 600), without = run(Json::object(), 600);
  REQUIRE(with.nll.size() == 599);
  for (size_t i = 0; i < with.nll.size(); ++i) CHECK(with.nll[i] == Approx(without.nll[i]).epsilon(1e-6));
  CHECK(with.bytes.codes == without.bytes.codes);
  CHECK_THROWS_WITH(run(prompt, 300),
                    "two bits: fake-quant codes every token of a window of 300; nothing is coded before the 400 tokens "
                    "of cache.prompt are there");
}

TEST_CASE("how many positions a replay scores is known before it begins, and so is what it refuses", "[replay]") {
  MeanRuntime model;
  std::vector<ReplayText> texts(2);
  for (int32_t t = 0; t < 200; ++t) texts[static_cast<size_t>(t >= 70)].tokens.push_back(t % 16);  // 70 and 130
  const auto codecs = exact_codec_set(model.facts().cache_shape());
  for (const ReplayMode mode : {ReplayMode::kForced, ReplayMode::kPrefillExact})
    for (const int64_t windows : {0, 1})
      for (const int64_t prompt : {0, 1, 20}) {
        const ReplayOptions options{.context = 32, .windows = windows, .prompt = prompt, .block = 16};
        const ReplayCandidate candidate{
            .label = "exact", .codecs = codecs, .policy = CachePolicy::exact(), .mode = mode};
        const int64_t scored = scored_positions(model, texts, options, mode);
        CHECK(scored == std::ssize(replay(model, texts, std::span(&candidate, 1), options).position));
        CHECK(scored == (windows == 1 ? 1 : 6) * (mode == ReplayMode::kForced || prompt == 1 ? 31 : prompt ? 12 : 16));
      }
  const auto refused = [&](const ReplayOptions& options, ErrorKind kind, const std::string& part) {
    try {
      scored_positions(model, texts, options, ReplayMode::kPrefillExact);
      FAIL("accepted");
    } catch (const Error& e) {
      CHECK(e.kind() == kind);
      CHECK_THAT(e.what(), Catch::Contains(part));
    }
  };
  refused({.context = 257}, ErrorKind::kUsage, "beyond the model's");
  refused({.context = 1}, ErrorKind::kUsage, "too short to score anything");
  refused({.context = 32, .prompt = 32}, ErrorKind::kUsage,
          "an exact prompt of 32 tokens leaves nothing to score in 32");
  refused({.context = 131}, ErrorKind::kBadData, "no text holds a whole window of 131 tokens");
}
