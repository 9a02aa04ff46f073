// Every registered method end to end on a tiny committed model: captured, trained on the trace, then replayed through
// every attention path, in blocks and in steps.
#include "generation/replay.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "codec/build.h"
#include "experiment/trace_rows.h"
#include "generation/capture.h"
#include "support/catch.h"
#include "support/method_configs.h"
#include "support/sweep_trace.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

// Random weights, two layers, head_dim 32, 4 query heads over 2 KV heads.
constexpr const char* kModel = VQKV_SOURCE_DIR "/tests/golden/tiny/qwen3.gguf";
constexpr int64_t kContext = 200;

struct Captured {
  std::unique_ptr<ModelRuntime> model = load_model(kModel);
  TestFolder folder;
  std::unique_ptr<TraceReader> reader;
  std::unique_ptr<TraceRows> rows;

  std::vector<int32_t> ids(uint64_t seed, int64_t n) const {
    Rng rng(seed);
    std::vector<int32_t> out;
    for (int64_t i = 0; i < n; ++i)
      out.push_back(static_cast<int32_t>(rng.below(static_cast<uint64_t>(model->facts().vocab))));
    return out;
  }

  Captured() {
    const std::string path = folder / "t.trace.h5";
    const std::vector<TextDocument> documents = {{"a", ids(1, 512)}, {"b", ids(2, 512)}};
    const CaptureOptions options{.context = 512};
    const CapturePlan plan = plan_capture(documents, options, model->facts(), {});
    TraceInfo info = capture_info(model->facts(), options);
    info.provenance = {{"tool", "test"}};
    TraceWriter writer(path, info, plan.names, plan.tokens, plan.queries);
    REQUIRE(capture_trace(*model, plan, writer));
    CellConfig config;
    config.trace = path;
    config.train = {0, 1};
    config.cache = canonical_cache_config(Json::object());
    reader = std::make_unique<TraceReader>(path);
    rows = std::make_unique<TraceRows>(*reader, config);
  }

  // Null: the method says that it can't code this.
  std::shared_ptr<const CodecSet> codecs(const Json& config) const {
    const CodecPlan plan = plan_in_scope(resolve_codec(config, model->facts().cache_shape()), rows->scope());
    return plan.skip.empty() ? train_codec_set(plan, rows->scope().shape, *rows, {}) : nullptr;
  }
};

double mean(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += std::abs(a[i] - b[i]);
  return sum / static_cast<double>(a.size());
}

double largest(const std::vector<double>& a, const std::vector<double>& b) {
  REQUIRE(a.size() == b.size());
  double worst = 0;
  for (size_t i = 0; i < a.size(); ++i) worst = std::max(worst, std::abs(a[i] - b[i]));
  return worst;
}

// KIVI's per-channel keys go 32 tokens a block.
const Json kReplayCache = {{"sinks", 4}, {"window", 8}, {"flush", 32}};

}  // namespace

TEST_CASE("every method replays a tiny model through every attention path, in blocks as in steps",
          "[conformance][replay]") {
  const Captured in;
  const ReplayText text{"text", in.ids(3, kContext)};
  for (const Method* method : all_methods()) {
    const std::string name = method->describe().name;
    std::map<std::string, int> ran;
    std::vector<Json> written;
    for (const std::string& group : test_groups(name)) written.push_back(test_config(name, group));
    if (method->describe().family == "sign") {  // scored from tables where no channel stands apart
      written.push_back(written.front());
      written.back()["preset"] = "no_outliers";
    }
    for (const Json& base : written)
      for (const std::string& rope : method->describe().rope)
        for (const int heads : {1, 2})
          for (const bool transforms : {false, true}) {
            Json config = base;
            set_rope(config, rope);
            config["heads"] = heads;
            if (transforms) config["transform"] = chain_of(name);
            const auto codecs = in.codecs(config);
            if (!codecs) continue;
            std::vector<ReplayCandidate> candidates;
            std::vector<std::string> paths = attention_backend_names();
            paths.push_back("auto");
            for (const std::string& path : paths) {
              // Table paths take what they can take, and no other path runs instead.
              const auto backend = make_attention_backend(path);
              if (std::ranges::any_of(codecs->units(), [&](const TrainedUnit& u) {
                    return backend->can(u.codec->plan(), u.spec.unit.role).has_value();
                  }))
                continue;
              ReplayCandidate c{.label = path,
                                .codecs = codecs,
                                .policy = CachePolicy::from_json(canonical_cache_config(kReplayCache)),
                                .attention = path,
                                .block = 77};
              candidates.push_back(c);
              c.label += " in steps";
              c.mode = ReplayMode::kStepwise;
              candidates.push_back(c);
            }
            CAPTURE(name, rope, heads, transforms);
            const ReplayResult r =
                replay(*in.model, std::span(&text, 1), candidates, {.context = kContext, .attention = "reference"});
            REQUIRE(r.tracks.size() >= 4);
            const ReplayTrack& reference = r.tracks[0];
            REQUIRE(reference.path == "reference");
            for (size_t i = 0; i < r.tracks.size(); i += 2) {
              const ReplayTrack &blocks = r.tracks[i], &steps = r.tracks[i + 1];
              CAPTURE(blocks.label, blocks.path, steps.path);
              if (blocks.label != "auto") {
                CHECK(blocks.path.starts_with(blocks.label));
                // Steps before the first code sum nothing by code, and say so beside what runs later.
                CHECK(steps.path.ends_with(blocks.path));
                CHECK(blocks.nll == steps.nll);
                CHECK(blocks.kld == steps.kld);
              }
              // Logits of coded keys err by at most 2^-10 by table, 2^-3 with 8-bit tables (attention.h), and two
              // layers carry that on. Where auto changes its way between steps, a last bit turns a code of few levels
              // here and there, and that is a whole level.
              for (const ReplayTrack* t : {&blocks, &steps})
                if (blocks.label == "cpu-table8")
                  CHECK(mean(t->nll, reference.nll) < 0.0625);
                else
                  CHECK(largest(t->nll, reference.nll) < (blocks.label == "auto" ? 0.05 : 4e-3));
              CHECK(blocks.coded_mass > 0);
              CHECK(blocks.bytes.to_json() == reference.bytes.to_json());
              ++ran[blocks.label];
            }
            if (name == "exact" && !transforms)
              CHECK(largest(reference.kld, std::vector<double>(reference.kld.size())) < 1e-5);
            else if (name != "exact")
              CHECK(*std::ranges::max_element(reference.kld) > 1e-6);
            ++ran[rope + (transforms ? ", transforms" : ", plain")];
          }
    CAPTURE(name);
    std::vector<std::string> must = {"reference", "cpu-reconstruct", "auto"};
    for (const std::string& rope : method->describe().rope)
      must.insert(must.end(), {rope + ", plain", rope + ", transforms"});
    if (method->describe().family == "table" || method->describe().family == "sign")
      must.insert(must.end(), {"cpu-table", "cpu-table8"});
    for (const std::string& what : must) CHECK(ran[what] > 0);
  }
}

TEST_CASE("policies that decide replay a tiny model on every path, alike in steps and blocks",
          "[conformance][replay]") {
  const Captured in;
  const ReplayText text{"text", in.ids(4, kContext)};
  for (const std::string& codec : {std::string("pq"), std::string("exact")})
    for (const Json& policy : {Json{{"name", "h2o"}, {"heavy", 0.2}, {"recent", 16}, {"interval", 24}},
                               Json{{"name", "snapkv"}, {"budget", 48}, {"observe", 8}, {"interval", 56}}})
      for (const ReplayMode mode : {ReplayMode::kForced, ReplayMode::kPrefillExact}) {
        Json cache = kReplayCache, config = test_config(codec);
        config["heads"] = 1;
        const auto codecs = in.codecs(config);
        REQUIRE(codecs);
        std::vector<ReplayCandidate> candidates = {{.label = "all",
                                                    .codecs = codecs,
                                                    .policy = CachePolicy::from_json(canonical_cache_config(cache)),
                                                    .mode = mode}};
        cache["policy"] = policy;
        for (const std::string& path : attention_backend_names()) {
          const auto backend = make_attention_backend(path);
          if (std::ranges::any_of(codecs->units(), [&](const TrainedUnit& u) {
                return backend->can(u.codec->plan(), u.spec.unit.role).has_value();
              }))
            continue;
          for (const int64_t block : {1, 7, 200})
            candidates.push_back({.label = path + " by " + std::to_string(block),
                                  .codecs = codecs,
                                  .policy = CachePolicy::from_json(canonical_cache_config(cache)),
                                  .attention = path,
                                  .mode = mode,
                                  .block = block});
        }
        CAPTURE(codec, policy.dump(), replay_mode_name(mode));
        const ReplayResult r = replay(*in.model, std::span(&text, 1), candidates,
                                      {.context = kContext, .prompt = mode == ReplayMode::kForced ? 0 : 101});
        REQUIRE(r.tracks.size() >= 7);
        for (size_t i = 1; i < r.tracks.size(); i += 3) {
          CAPTURE(r.tracks[i].label);
          for (size_t b = i + 1; b < i + 3; ++b) {
            CHECK(r.tracks[b].nll == r.tracks[i].nll);
            CHECK(r.tracks[b].bytes.to_json() == r.tracks[i].bytes.to_json());
          }
          CHECK(r.tracks[i].nll != r.tracks[0].nll);
          const auto held = [](const ReplayTrack& t) { return t.bytes.codes + t.bytes.side; };
          CHECK(held(r.tracks[i]) < held(r.tracks[0]));
        }
      }
}

TEST_CASE("tiers by age replay a tiny model through every attention path, in blocks as in steps",
          "[conformance][replay][tiers]") {
  const Captured in;
  const ReplayText text{"text", in.ids(3, kContext)};
  const auto codecs = in.codecs(parse_json(R"({"tiers": [
      {"tokens": 32, "name": "rvq", "preset": "embedded", "codebooks": 6, "bits": 5, "iterations": 3},
      {"tokens": 64, "level": 3}, {"level": 1}]})",
                                           "test"));
  REQUIRE(codecs);
  std::vector<ReplayCandidate> candidates;
  for (const std::string& path : attention_backend_names())
    for (const bool steps : {false, true})
      candidates.push_back({.label = path,
                            .codecs = codecs,
                            .policy = CachePolicy::from_json(canonical_cache_config(kReplayCache)),
                            .attention = path,
                            .mode = steps ? ReplayMode::kStepwise : ReplayMode::kForced,
                            .block = 77});
  const ReplayResult r =
      replay(*in.model, std::span(&text, 1), candidates, {.context = kContext, .attention = "reference"});
  for (size_t i = 0; i < r.tracks.size(); i += 2) {
    CAPTURE(r.tracks[i].label);
    CHECK(r.tracks[i].nll == r.tracks[i + 1].nll);
    CHECK(largest(r.tracks[i].nll, r.tracks[0].nll) < (r.tracks[i].label == "cpu-table8" ? 0.3 : 0.02));
  }
  // Between the code of all stages and that of one.
  const auto kld = [&](const char* config, int64_t& bytes) {
    candidates[0].codecs = in.codecs(parse_json(config, "test"));
    const ReplayResult one =
        replay(*in.model, std::span(&text, 1), std::span(candidates).first(1), {.context = kContext});
    bytes = one.tracks[0].bytes.codes;
    return mean(one.tracks[0].kld, std::vector<double>(one.tracks[0].kld.size()));
  };
  int64_t all = 0, one = 0;
  const double best = kld(R"({"name": "rvq", "preset": "embedded", "codebooks": 6, "bits": 5, "iterations": 3})", all);
  const double worst = kld(R"({"name": "rvq", "preset": "embedded", "codebooks": 1, "bits": 5, "iterations": 3})", one);
  const double tiers = mean(r.tracks[0].kld, std::vector<double>(r.tracks[0].kld.size()));
  CHECK(best < tiers);
  CHECK(tiers < worst);
  CHECK(one < r.tracks[0].bytes.codes);
  CHECK(r.tracks[0].bytes.codes < all / 2);
}
