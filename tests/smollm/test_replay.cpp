// Replay over the real model, rung by rung: exact equals exact, blocks equal steps, then what the modes mean.
#include "attention/session_cpu.h"
#include "generation/replay.h"

#include <algorithm>
#include <numeric>

#include "codec/build.h"
#include "core/rng.h"
#include "core/thread_pool.h"
#include "generation/logits.h"
#include "io/atomic_file.h"
#include "support/catch.h"

using namespace vqkv;

namespace {

struct NoRows final : TrainSource {
  TrainData unit(const UnitShape&, const TrainNeeds&) const override { return {}; }
};

struct RandomRows final : TrainSource {
  TrainData unit(const UnitShape& unit, const TrainNeeds&) const override {
    TrainData data;
    data.x = Matrix<float>(256, unit.channels());
    Rng rng(static_cast<uint64_t>(unit.layer * 16 + unit.first_head) * 2 + (unit.role == Role::kValue));
    for (float& v : data.x.storage) v = static_cast<float>(rng.normal());
    data.position.assign(256, 0);
    data.document.assign(256, 0);
    return data;
  }
};

// A method that learns nothing.
std::shared_ptr<const CodecSet> codecs_of(const Json& config, const ModelFacts& facts) {
  const CodecPlan plan = resolve_codec(config, facts.cache_shape());
  REQUIRE(plan.skip.empty());
  TrainOptions options;
  options.cell = "test";
  options.model_hash = facts.hash;
  return train_codec_set(plan, facts.cache_shape(), NoRows(), options);
}

struct Bench {
  std::unique_ptr<ModelRuntime> model = load_model(VQKV_SOURCE_DIR "/data/models/SmolLM2-135M-Instruct.Q4_1.gguf");
  std::vector<ReplayText> texts;
  const ModelFacts& facts = model->facts();

  explicit Bench(int64_t tokens = 4096) {
    for (const char* name : {"jargon-3.txt", "kjv-2.txt"}) {
      auto ids = model->tokenizer().encode(read_file(std::string(VQKV_SOURCE_DIR "/data/") + name));
      ids.resize(std::min(ids.size(), static_cast<size_t>(tokens)));
      texts.push_back({name, std::move(ids)});
    }
  }
  ReplayCandidate candidate(const std::string& label, const Json& codec, const Json& cache,
                            ReplayMode mode = ReplayMode::kForced, int64_t block = 128) const {
    return {.label = label,
            .codecs = codecs_of(codec, facts),
            .policy = CachePolicy::from_json(cache),
            .mode = mode,
            .block = block};
  }
  ReplayCandidate exact(int64_t block) const {
    return {.label = "exact",
            .codecs = exact_codec_set(facts.cache_shape()),
            .policy = CachePolicy::exact(),
            .block = block};
  }
  Matrix<float> logits(const ReplayCandidate& c, int64_t tokens, int64_t block,
                       Visibility visibility = Visibility::kReplay) const {
    CompressedCache cache(c.codecs, c.policy);
    const auto backend = make_attention_backend("cpu-reconstruct");  // auto may go another way in steps than in blocks
    KvSessionCpu session(cache, *backend);
    Matrix<float> out(tokens, facts.vocab);
    for (int64_t at = 0; at < tokens; at += block) {
      const int64_t n = std::min(block, tokens - at);
      model->forward(std::span(texts[0].tokens).subspan(static_cast<size_t>(at), static_cast<size_t>(n)), session,
                     LogitRows::kAll, out.view().slice_rows(at, n), visibility);
    }
    return out;
  }
  double worst_kld(const Matrix<float>& a, const Matrix<float>& b) const {
    double worst = 0;
    for (int64_t r = 0; r < a.rows; ++r) {
      const LogitFacts x = logit_facts(a.row(r), a.cols, 0), y = logit_facts(b.row(r), b.cols, 0);
      worst = std::max(worst, kl_divergence(a.row(r), x.log_sum, b.row(r), y.log_sum, a.cols));
    }
    return worst;
  }
};

double mean(const std::vector<double>& x) {
  return std::accumulate(x.begin(), x.end(), 0.0) / static_cast<double>(x.size());
}

const Json kNoWindow = {{"sinks", 4}, {"window", 1}, {"flush", 1}};

}  // namespace

TEST_CASE("exact against exact: no divergence at all, and the positions are every token but the first", "[replay]") {
  const Bench b;
  const ReplayCandidate candidates[] = {b.exact(128)};
  const ReplayResult r = replay(*b.model, b.texts, candidates, {.context = 192, .windows = 3});
  REQUIRE(r.windows == 3);
  REQUIRE(r.position.size() == 3 * 191);
  CHECK_FALSE(r.bos);  // SmolLM2 adds none
  for (size_t i = 0; i < r.position.size(); ++i) {
    CHECK(r.position[i] == static_cast<int32_t>(i % 191) + 1);
    CHECK(r.window[i] == static_cast<int32_t>(i / 191));
    CHECK(r.document[i] == static_cast<int32_t>(i / 191 % 2));  // the documents in turn
  }
  const ReplayTrack& t = r.tracks[0];
  CHECK(t.nll == r.nll_exact);
  CHECK(*std::max_element(t.kld.begin(), t.kld.end()) == 0);
  CHECK(std::count(t.same_top.begin(), t.same_top.end(), 0) == 0);
  CHECK(t.flips == std::vector<int32_t>{-1, -1, -1});
  CHECK(t.coded_mass == 0);
  CHECK(t.total_mass == Approx(3.0 * 192 * b.facts.layers * b.facts.q_heads));
  CHECK(t.total_mass_last == Approx(3.0 * 48 * b.facts.layers * b.facts.q_heads));
  CHECK(t.bytes.total_sequence() > 192 * b.facts.kv_bytes_per_token(DType::kF16));
  // The bytes of the scored text: what the tokenizer gives back of them.
  int64_t bytes = 0;
  for (size_t w = 0; w < 3; ++w) {
    const auto& ids = b.texts[w % 2].tokens;
    const auto first = ids.begin() + static_cast<int64_t>(w / 2) * 192;
    bytes += static_cast<int64_t>(b.model->tokenizer().decode({first + 1, first + 192}).size());
  }
  CHECK(r.text_bytes == bytes);
}

TEST_CASE("blocks of any length equal token-by-token replay, across flushes", "[replay]") {
  const Bench b;
  constexpr int64_t kTokens = 200;
  // rtn: a page every 16 tokens behind a window of 16. kivi: keys in groups of 32 by a sawtooth, values one by one.
  // streaming: as rtn, with nothing where its codes are.
  const ReplayCandidate candidates[] = {
      b.exact(1), b.candidate("rtn", {{"name", "rtn"}, {"bits", 2}}, {{"sinks", 4}, {"window", 16}, {"flush", 16}}),
      b.candidate("kivi", {{"name", "kivi"}, {"bits", 2}, {"group", 32}},
                  {{"sinks", 0}, {"rule", "kivi"}, {"residual", 32}}),
      b.candidate("streaming", {{"name", "exact"}},
                  {{"sinks", 4}, {"window", 16}, {"flush", 16}, {"policy", "streaming"}})};
  for (const auto& c : candidates) {
    INFO(c.label);
    const auto blocks = b.logits(c, kTokens, 128), others = b.logits(c, kTokens, 61), steps = b.logits(c, kTokens, 1);
    CHECK(b.worst_kld(steps, blocks) < 1e-8);
    CHECK(b.worst_kld(steps, others) < 1e-8);
    if (c.policy.codes)
      CHECK(b.worst_kld(b.logits(candidates[0], kTokens, 128), blocks) > 1e-4);  // something was coded, or dropped
  }
  // And replay's own modes agree about it.
  ReplayCandidate forced = candidates[2], stepwise = candidates[2];
  forced.block = 61;
  stepwise.mode = ReplayMode::kStepwise;
  const ReplayCandidate both[] = {forced, stepwise};
  const ReplayResult r = replay(*b.model, b.texts, both, {.context = kTokens, .windows = 1});
  for (size_t i = 0; i < r.position.size(); ++i) {
    CHECK(r.tracks[0].nll[i] == Approx(r.tracks[1].nll[i]).margin(1e-4));
    CHECK(r.tracks[0].kld[i] == Approx(r.tracks[1].kld[i]).margin(1e-4));
  }
  CHECK(r.tracks[0].coded_mass == Approx(r.tracks[1].coded_mass).epsilon(1e-4));
  CHECK(r.tracks[0].bytes.to_json() == r.tracks[1].bytes.to_json());
}

TEST_CASE("one path for all rows: a last block of one query and single steps give the same bits", "[replay]") {
  const Bench b;
  const CodecPlan plan =
      resolve_codec({{"name", "pq"}, {"codebooks", 16}, {"bits", 4}, {"iterations", 2}}, b.facts.cache_shape());
  TrainOptions options;
  options.cell = "test";
  options.model_hash = b.facts.hash;
  const auto codecs = train_codec_set(plan, b.facts.cache_shape(), RandomRows(), options);
  const auto candidate = [&](int64_t block, ReplayMode mode = ReplayMode::kForced) {
    return ReplayCandidate{
        .label = "pq", .codecs = codecs, .policy = CachePolicy::from_json(kNoWindow), .mode = mode, .block = block};
  };
  // 97 tokens: in one block; in 32s, the last of one query; in 7s; and in single steps, which `auto` scans by tables.
  std::vector<ReplayCandidate> candidates{candidate(97), candidate(32), candidate(7),
                                          candidate(1, ReplayMode::kStepwise)};
  const ReplayResult r = replay(*b.model, b.texts, candidates, {.context = 97, .windows = 1, .block = 32});
  REQUIRE(r.windows == 1);
  CHECK(r.exact_path == "cpu-reconstruct");
  for (const ReplayTrack& t : r.tracks) {
    CHECK(t.path == r.exact_path);
    CHECK(t.nll == r.tracks[0].nll);
    CHECK(t.kld == r.tracks[0].kld);
    CHECK(t.coded_mass > 0);
  }

  // A path asked for by name holds for the exact cache too.
  for (auto& c : candidates) c.attention = "cpu-table";
  const ReplayResult by_table = replay(*b.model, b.texts, std::span(candidates).first(2),
                                       {.context = 97, .windows = 1, .attention = "cpu-table"});
  CHECK(by_table.exact_path.starts_with("cpu-table"));
  CHECK(by_table.tracks[0].path.starts_with("cpu-table"));
  CHECK(by_table.tracks[1].nll == by_table.tracks[0].nll);
  // Each step by the cheapest: what a row ran is said.
  candidates[3].attention = "auto";
  const ReplayResult automatic =
      replay(*b.model, b.texts, std::span(candidates).subspan(3), {.context = 97, .windows = 1});
  CHECK(automatic.tracks[0].path.find("cpu-table") != std::string::npos);
}

TEST_CASE("an exact prompt: the first prediction after it is exact, later ones are not", "[replay]") {
  const Bench b;
  const Json codec = {{"name", "rtn"}, {"bits", 2}};
  const ReplayCandidate candidates[] = {b.candidate("rtn2", codec, kNoWindow, ReplayMode::kPrefillExact),
                                        b.candidate("rtn2 forced", codec, kNoWindow)};
  const ReplayResult r = replay(*b.model, b.texts, candidates, {.context = 256, .windows = 2, .prompt = 100});
  CHECK(r.prompt == 100);
  REQUIRE(r.position.size() == 2 * 156);
  for (size_t w = 0; w < 2; ++w) {
    CHECK(r.position[w * 156] == 100);
    CHECK(r.tracks[0].kld[w * 156] == 0);
    CHECK(r.tracks[0].nll[w * 156] == r.nll_exact[w * 156]);
    CHECK(r.tracks[0].kld[w * 156 + 1] > 1e-3);
    CHECK(r.tracks[1].kld[w * 156] > 1e-3);
    CHECK((r.tracks[0].flips[w] == -1 || r.tracks[0].flips[w] > 100));
  }
  CHECK(mean(r.tracks[0].kld) < mean(r.tracks[1].kld));  // the prompt's hidden states are clean
  // Only the 156 positions after the prompt count, and about as much of their attention fell on codes.
  CHECK(r.tracks[0].total_mass == Approx(2.0 * 156 * b.facts.layers * b.facts.q_heads));
  CHECK(r.tracks[0].coded_mass > 0.2 * r.tracks[0].total_mass);
}

TEST_CASE("fake-quant codes a token's own key and value, and equals one pass over the window", "[replay]") {
  const Bench b;
  for (const Json& codec : {Json{{"name", "rtn"}, {"bits", 3}}, Json{{"name", "kivi"}, {"bits", 2}, {"group", 32}}}) {
    const Json cache = codec["name"] == "rtn" ? kNoWindow : Json{{"sinks", 4}, {"rule", "kivi"}, {"residual", 32}};
    const ReplayCandidate candidates[] = {b.candidate("fake", codec, cache, ReplayMode::kFakeQuant),
                                          b.candidate("forced", codec, cache)};
    const ReplayResult r = replay(*b.model, b.texts, candidates, {.context = 300, .windows = 1});  // two stretches
    CHECK(mean(r.tracks[0].kld) > mean(r.tracks[1].kld));
    CHECK(r.tracks[0].coded_mass > r.tracks[1].coded_mass);
    const auto whole = b.logits(candidates[0], 300, 300, Visibility::kAllCoded);
    for (size_t i = 0; i < r.position.size(); ++i)
      CHECK(r.tracks[0].nll[i] ==
            Approx(logit_facts(whole.row(static_cast<int64_t>(i)), whole.cols, b.texts[0].tokens[i + 1]).nll)
                .margin(1e-4));
  }
}

TEST_CASE("fewer bits cost more, and a window hides the cost", "[replay]") {
  const Bench b;
  std::vector<ReplayCandidate> candidates;
  for (const int bits : {8, 4, 2})
    candidates.push_back(b.candidate(std::to_string(bits), {{"name", "rtn"}, {"bits", bits}}, kNoWindow));
  candidates.push_back(
      b.candidate("window", {{"name", "rtn"}, {"bits", 2}}, {{"sinks", 4}, {"window", 128}, {"flush", 1}}));
  const ReplayResult r = replay(*b.model, b.texts, candidates, {.context = 256, .windows = 2});
  const auto& t = r.tracks;
  CHECK(mean(t[0].kld) > 1e-6);
  CHECK(mean(t[0].kld) * 10 < mean(t[1].kld));
  CHECK(mean(t[1].kld) * 3 < mean(t[2].kld));
  CHECK(mean(t[3].kld) * 2 < mean(t[2].kld));
  CHECK(t[3].coded_mass < t[2].coded_mass);
  CHECK(t[2].coded_mass_last / t[2].total_mass_last > 0.3);
  CHECK(t[0].bytes.codes == 2 * t[1].bytes.codes);
}

TEST_CASE("replay gives the same bits with one and with two threads", "[replay]") {
  std::vector<ReplayResult> results;
  for (const int threads : {1, 2}) {
    set_thread_count(threads);
    const Bench b;
    const ReplayCandidate candidates[] = {b.candidate("rtn", {{"name", "rtn"}, {"bits", 4}}, kNoWindow),
                                          b.candidate("kivi", {{"name", "kivi"}, {"bits", 2}, {"group", 32}},
                                                      {{"sinks", 4}, {"rule", "kivi"}, {"residual", 32}})};
    results.push_back(replay(*b.model, b.texts, candidates, {.context = 192, .windows = 2}));
  }
  CHECK(results[0].nll_exact == results[1].nll_exact);
  for (size_t c = 0; c < 2; ++c) {
    CHECK(results[0].tracks[c].nll == results[1].tracks[c].nll);
    CHECK(results[0].tracks[c].kld == results[1].tracks[c].kld);
    CHECK(results[0].tracks[c].delta_p == results[1].tracks[c].delta_p);
    CHECK(results[0].tracks[c].coded_mass == results[1].tracks[c].coded_mass);
  }
}

TEST_CASE("an interrupted replay keeps whole windows, what can't be replayed is refused", "[replay]") {
  const Bench b;
  const ReplayCandidate candidates[] = {b.candidate("rtn", {{"name", "rtn"}, {"bits", 4}}, kNoWindow)};
  int asked = 0;
  const ReplayResult r = replay(*b.model, b.texts, candidates, {.context = 64, .windows = 4},
                                [&] { return ++asked > 6; });  // four blocks a window: two stretches, two caches
  CHECK(r.windows == 1);
  CHECK(r.position.size() == 63);
  CHECK(r.tracks[0].kld.size() == 63);
  CHECK(r.tracks[0].flips.size() == 1);
  const auto refused = [&](const ReplayOptions& o, ReplayMode mode = ReplayMode::kForced) {
    ReplayCandidate c = candidates[0];
    c.mode = mode;
    CHECK_THROWS_AS(replay(*b.model, b.texts, std::span(&c, 1), o), Error);
  };
  refused({.context = 8193});
  refused({.context = 1});
  refused({.context = 8000});  // no text is so long
  refused({.context = 64, .prompt = 64}, ReplayMode::kPrefillExact);
  CHECK_THROWS_AS(replay_mode_from_name("force"), Error);
  for (const char* name : {"forced", "stepwise", "prefill-exact", "fake-quant"})
    CHECK(replay_mode_name(replay_mode_from_name(name)) == name);
}
