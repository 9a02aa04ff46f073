// The rows beside a codec's own in a table of replays, and what `inspect` says of a head.
#include "experiment/replay_rows.h"

#include <algorithm>
#include <cmath>

#include "experiment/head_statistics.h"
#include "experiment/protocol.h"
#include "support/cache_shape.h"
#include "support/catch.h"
#include "support/sweep_trace.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

// As if it had learned from `vectors` rows.
std::shared_ptr<const CodecSet> codec_set(const Json& config, int64_t vectors, int head_dim = 16) {
  const CodecPlan plan = resolve_codec(config, make_shape(1, 1, 2, head_dim));
  std::vector<TrainedUnit> units;
  for (const UnitSpec& spec : plan.units) {
    TrainReport report;
    report.vectors = vectors;
    units.push_back({spec, make_codec(spec), report});
  }
  return std::make_shared<CodecSet>(make_shape(1, 1, 2, head_dim), plan.config, std::move(units), "");
}

}  // namespace

TEST_CASE("rows of the protocol: self-noise in another type, no window, and the window alone", "[replay-rows]") {
  const ReplayCandidate noise = self_noise(make_shape(1, 1, 2, 16), DType::kF16, "auto", 256);
  CHECK(noise.label == "self-noise (exact in f32)");
  CHECK_FALSE(noise.policy.codes);
  CHECK(noise.policy.exact_dtype == DType::kF32);
  CHECK(noise.block == 125);
  CHECK(self_noise(make_shape(1, 1, 2, 16), DType::kF32, "auto", 1).label == "self-noise (exact in f16)");
  CHECK(self_noise(make_shape(1, 1, 2, 16), DType::kF32, "auto", 1).block == 1);

  const CachePolicy window = CachePolicy::from_json({{"sinks", 4}, {"window", 64}, {"flush", 32}});
  const auto kivi = codec_set({{"name", "kivi"}, {"bits", 2}, {"group", 16}}, 0);
  const CachePolicy bare = without_window(*kivi, window);
  CHECK(bare.sinks == 4);
  CHECK(bare.k.window == 1);
  CHECK(bare.k.flush == 16);  // a group of tokens is one block
  CHECK(bare.v.flush == 1);

  const auto alone = streaming_beside(window);
  REQUIRE(alone);
  CHECK(alone->drops);
  CHECK(alone->k.window == 64);
  CHECK_FALSE(streaming_beside(*alone));  // it keeps no codes
  CHECK_FALSE(streaming_beside(CachePolicy::exact()));
  CHECK_FALSE(streaming_beside(CachePolicy::from_json({{"rule", "kivi"}, {"residual", 32}})));  // two rules

  CHECK(no_streaming_beside(window) == "");
  CHECK(no_streaming_beside(*alone) == "");
  CHECK(no_streaming_beside(CachePolicy::exact()) == "");
  CHECK(no_streaming_beside(CachePolicy::from_json({{"rule", "kivi"}, {"residual", 32}})) ==
        "keys: blocks of 32; values: window 33 + 4 sinks: keys and values leave by rules of their own, so no row says "
        "what its window does alone");
  CHECK_THAT(no_streaming_beside(CachePolicy::from_json({{"window", 64}, {"v", {{"window", 32}}}})),
             Catch::Contains("rules of their own"));
  CHECK(
      no_streaming_beside(CachePolicy::from_json({{"prompt", 2048}})) ==
      "window 128, blocks of 64 + 4 sinks, after a prompt of 2,048 tokens: no window slides over the prompt, so no row "
      "says what its window does alone");
  CHECK_THAT(no_streaming_beside(CachePolicy::from_json({{"window", 0}})), Catch::Contains("there is no window"));

  ReplayCandidate c{.label = "c", .codecs = kivi, .policy = window};
  CHECK(protocol_of(c) == protocol_text(window));
  c.mode = ReplayMode::kPrefillExact;
  CHECK(protocol_of(c) == "exact prompt, then " + protocol_text(window));
  c.mode = ReplayMode::kFakeQuant;
  CHECK(protocol_of(c) == "no exact token + 4 sinks");
}

TEST_CASE("rows of a table: self-noise, codecs and their windowless twins, streaming once a protocol, pairs of a kind",
          "[replay-rows]") {
  const auto loaded = [](const std::string& label, const Json& cache) {
    return LoadedCodec{.label = label,
                       .codecs = codec_set({{"name", "rtn"}, {"bits", 4}, {"group", 16}}, 0),
                       .policy = CachePolicy::from_json(cache),
                       .cache = cache};
  };
  const Json wide = {{"window", 64}, {"flush", 32}}, narrow = {{"window", 32}, {"flush", 32}};
  const std::vector<LoadedCodec> codecs{loaded("a", wide), loaded("b", wide), loaded("c", narrow),
                                        loaded("exact", {{"rule", "none"}})};
  const auto labels = [](const std::vector<ReplayRow>& rows) {
    std::vector<std::string> out;
    for (const ReplayCandidate& c : candidates_of(rows)) out.push_back(c.label);
    return out;
  };
  const std::vector<ReplayRow> rows =
      replay_rows(codecs, make_shape(1, 1, 2, 16), {}, {.block = 8, .windowless = true});
  CHECK(labels(rows) == std::vector<std::string>{"self-noise (exact in f32)", "a", "a (no window)", "b",
                                                 "b (no window)", "c", "c (no window)", "exact", "streaming",
                                                 "streaming #2"});
  CHECK(rows[1].candidate.block == 8);
  CHECK(rows[2].kind == ReplayRow::Kind::kWindowless);
  CHECK(rows[2].candidate.policy.k.window == 1);
  CHECK(rows[9].candidate.policy.k.window == 32);
  CHECK(
      labels(replay_rows(codecs, make_shape(1, 1, 2, 16), {}, {.mode = ReplayMode::kFakeQuant, .windowless = true})) ==
      std::vector<std::string>{"self-noise (exact in f32)", "a", "b", "c", "exact"});

  ReplayResult result;
  result.position = {1, 2};
  result.window = result.document = {0, 0};
  result.nll_exact = {1, 1};
  result.windows = 1;
  result.tracks.resize(rows.size());
  for (ReplayTrack& t : result.tracks) t.nll = t.kld = {1, 2};
  std::vector<std::string> pairs;
  for (const PairedDifference& d : compare_rows(result, rows, 4))
    if (d.what == "nll") pairs.push_back(rows[d.a].candidate.label + "/" + rows[d.b].candidate.label);
  std::ranges::sort(pairs);
  CHECK(pairs == std::vector<std::string>{"a (no window)/b (no window)", "a (no window)/c (no window)", "a/b", "a/c",
                                          "a/exact", "b (no window)/c (no window)", "b/c", "b/exact", "c/exact"});

  ReplayRow decides;
  decides.candidate.policy = CachePolicy::from_json({{"policy", "h2o"}});
  CHECK(decides.flags({}, 1000) == std::vector<std::string>{"policy gave nothing up"});
  ReplayTrack gave;
  gave.gave_up = true;
  CHECK(decides.flags(gave, 1000).empty());
}

TEST_CASE("a row in which no scored query meets a code says so", "[replay-rows]") {
  const auto flagged = [](const Json& config, const Json& cache, ReplayMode mode, int64_t context) {
    const ReplayRow row{
        .candidate = {
            .label = "c", .codecs = codec_set(config, 0), .policy = CachePolicy::from_json(cache), .mode = mode}};
    const auto flags = row.flags({}, context);
    CHECK(flags == (flags.empty() ? flags : std::vector<std::string>{"nothing-coded"}));
    return !flags.empty();
  };
  const Json rtn = {{"name", "rtn"}, {"bits", 4}, {"group", 16}}, kivi = {{"name", "kivi"}, {"group", 16}};
  const Json window = {{"sinks", 4}, {"window", 64}, {"flush", 32}};
  for (const ReplayMode mode : {ReplayMode::kForced, ReplayMode::kStepwise, ReplayMode::kPrefillExact}) {
    CAPTURE(replay_mode_name(mode));
    // Token 99 completes the first block, and the last row of a window predicts nothing.
    CHECK(flagged(rtn, window, mode, 100));
    CHECK_FALSE(flagged(rtn, window, mode, 101));
    CHECK(flagged(rtn, {{"prompt", 400}}, mode, 400));
    CHECK_FALSE(flagged(rtn, {{"prompt", 400}}, mode, 401));
    // Nothing of the prompt but its window, and all that follows, stays exact.
    CHECK(flagged(rtn, {{"sinks", 4}, {"window", 64}, {"prompt", 64}, {"generated", "exact"}}, mode, 1000));
    CHECK_FALSE(flagged(rtn, {{"rule", "none"}}, mode, 100));  // nobody expects a code
    CHECK(flagged(rtn, {{"coded", "image"}}, mode, 1000));     // a text has no image
    CHECK(flagged(rtn, {{"sinks", 4}, {"window", 64}, {"flush", 32}, {"policy", "streaming"}}, mode, 100));
    // One role is enough.
    CHECK_FALSE(flagged(rtn, {{"k", {{"window", 1000}}}, {"v", {{"window", 0}, {"flush", 1}}}}, mode, 100));
  }
  CHECK_FALSE(flagged(rtn, window, ReplayMode::kFakeQuant, 100));
  CHECK_FALSE(flagged(rtn, {{"window", 16}, {"prompt", 64}, {"generated", "exact"}}, ReplayMode::kFakeQuant, 100));
  const Json sinks = {{"sinks", 90}, {"rule", "kivi"}, {"residual", 16}};
  CHECK_FALSE(flagged(kivi, sinks, ReplayMode::kFakeQuant, 100));  // its values
  CHECK(flagged(rtn, {{"sinks", 200}}, ReplayMode::kFakeQuant, 100));
}

TEST_CASE("what a codec had seen of the texts: its documents, another trace, nothing to learn", "[replay-rows]") {
  const TestFolder dir;
  write_sweep_trace(dir / "a.trace.h5", 3, 160);
  const TraceReader trace(dir / "a.trace.h5");
  const auto ids = [&](int document) {
    const auto window = std::find_if(trace.windows().begin(), trace.windows().end(),
                                     [&](const TraceWindow& w) { return w.document == document; });
    const auto first = trace.token_id().begin() + window->first_token;
    return std::vector<int32_t>(first, first + window->tokens);
  };
  std::vector<int32_t> other(160);
  for (size_t i = 0; i < other.size(); ++i) other[i] = static_cast<int32_t>(100'000 + i);
  const ReplayText texts[] = {{"seen", ids(1)}, {"new", other}};
  const auto trained = codec_set({{"name", "rtn"}, {"group", 16}}, 10),
             plain = codec_set({{"name", "rtn"}, {"group", 16}}, 0);
  const Json origin = {{"path", dir / "a.trace.h5"}, {"train", {1}}, {"hash", trace.info().content_hash}};

  const Learned half = what_it_learned(*trained, origin, texts);
  CHECK(half.known);
  CHECK(half.seen == 0.5);
  CHECK(half.positions == 160);
  CHECK(half.flags(160) == std::vector<std::string>{"trained on these texts"});
  CHECK(half.flags(161) == std::vector<std::string>{"trained on these texts", "extrapolated"});
  CHECK(what_it_learned(*trained, origin, std::span(texts).subspan(1)).flags(160).empty());
  Json changed = origin;
  changed["hash"] = "another";
  CHECK(what_it_learned(*trained, changed, texts).flags(8) == std::vector<std::string>{"training unknown"});
  CHECK_FALSE(what_it_learned(*trained, Json(), texts).known);
  const Learned nothing = what_it_learned(*plain, Json(), texts);
  CHECK(nothing.known);
  CHECK(nothing.flags(4096).empty());
}

TEST_CASE("a head's numbers are their definitions, whatever the pieces", "[head-statistics]") {
  // Channel 0 is 10 or 6, channel 1 is 1 or -1, channel 2 half of that, channel 3 always 0.5.
  constexpr int64_t kRows = 400;
  Matrix<float> x(kRows, 4);
  for (int64_t r = 0; r < kRows; ++r) {
    x(r, 0) = r % 2 == 0 ? 10.0f : 6.0f;
    x(r, 1) = r % 4 < 2 ? 1.0f : -1.0f;
    x(r, 2) = 0.5f * x(r, 1);
    x(r, 3) = 0.5f;
  }
  const auto run = [&](int64_t piece) {
    HeadStatistics s(4);
    for (const bool second : {false, true})
      for (int64_t at = 0; at < kRows; at += piece) {
        const ConstMatrix part = x.view().slice_rows(at, std::min(piece, kRows - at));
        second ? s.second_pass(part) : s.first_pass(part);
      }
    return s.to_json();
  };
  const Json s = run(kRows);
  CHECK(run(7) == s);
  const double long_row = std::sqrt(100 + 1.5), short_row = std::sqrt(36 + 1.5);
  CHECK(s["norm"] == Approx((long_row + short_row) / 2));
  CHECK(s["norm_cv"] == Approx((long_row - short_row) / (long_row + short_row)));
  CHECK(s["mean_share"] == Approx((64 + 0.25) / (68 + 1 + 0.25 + 0.25)));
  CHECK(s["rank90"] == 1);          // the mean and channel 0
  CHECK(s["rank90_centred"] == 2);  // 4 of 5.25 in channel 0, the rest along (1, 0.5)
  CHECK(s["max_abs"] == 10);
  CHECK(s["outliers"] == Json({0}));
  CHECK(s["outlier_channels"] == 1);
  CHECK(s["worst_channel"] == 0);
  CHECK(s["worst_ratio"] == Approx(std::sqrt(68.0) / 1.0));  // the third of four sorted
  CHECK(s["kurtosis"] == Approx((16 + 1 + 0.0625) / 4 / std::pow(5.25 / 4, 2)));
}

TEST_CASE("a row whose queries are rounded says so", "[replay-rows]") {
  const auto flags = [](const Json& codec, const Json& cache) {
    const ReplayRow row{
        .candidate = {.label = "c", .codecs = codec_set(codec, 0, 32), .policy = CachePolicy::from_json(cache)}};
    return row.flags({}, 1000);
  };
  using Flags = std::vector<std::string>;
  const Json rounded = {{"name", "ggml"}, {"k", {{"query", "q8"}}}};
  CHECK(flags(rounded, {{"window", 8}}) == Flags{"quantized-query"});
  CHECK(flags(rounded, {{"rule", "none"}}).empty());
  CHECK(flags({{"name", "ggml"}}, {{"window", 8}}).empty());
}

TEST_CASE("a row whose codes are of text where its paper leaves text exact says so", "[replay-rows]") {
  const auto flags = [](const char* method, const Json& cache) {
    const ReplayRow row{.candidate = {.label = "c",
                                      .codecs = codec_set({{"name", method}}, 0),
                                      .policy = CachePolicy::from_json(cache)}};
    return row.flags({}, 1000);
  };
  using Flags = std::vector<std::string>;
  CHECK(flags("calibquant", {{"window", 8}}) == Flags{"off-label"});
  CHECK(flags("calibquant", {{"coded", "image"}}) == Flags{"nothing-coded"});
  CHECK(flags("calibquant", {{"rule", "none"}}).empty());
  CHECK(flags("exact", {{"window", 8}}).empty());
}
