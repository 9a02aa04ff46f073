// Forced replay of SmolLM2 with a coded cache, encoding included, against the exact cache in the same run.
//   bench_replay [CONTEXT=1024] [ROUNDS=3] [CODEC...]       prints JSON; VQKV_MODEL names another model
// Candidates and the exact cache take turns stretch by stretch (256 tokens); a round is one window; medians over
// rounds. No window: every token is coded, so nothing of the encoder's cost hides behind exact rows. Codebooks are
// trained on random rows, since neither search nor attention looks at values: what is measured here says nothing of
// quality.
//
// What to expect, in multiply-accumulates (MAC) a token. The model: parameters of the layers and the head, 134.5 M for
// SmolLM2 (the embedding is a look-up and, tied, counted once as the head). Encoders, for 180 heads and roles of 64
// channels:
//   pq 16x256      16 * 256 * 4 a vector,              2.9 M a token:  2 % of the model
//   rvq 16x256 b5  (1 + 15 * 5) * 256 * 64 a vector, 224 M a token:  1.7 x the model (scored directly: tables of
//   products
//                  would take more than kBeamTableBytes a codec)
//   vqkv           28 * 1024 * 64 a key, 8 * 512 * 64 a value, 189 M a token: 1.4 x the model
// A ratio below model / (model + encoder) means that the encoder runs at fewer MAC/s than the model's products
// (`encode_gmac_per_s`), or that attention over codes costs more than over exact rows (`attend_s`).
#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>

#include "codec/build.h"
#include "core/cpu.h"
#include "core/json.h"
#include "core/rng.h"
#include "core/thread_pool.h"
#include "generation/replay.h"
#include "metric/statistics.h"

using namespace vqkv;

namespace {

class RandomRows final : public TrainSource {
 public:
  TrainData unit(const UnitShape& unit, const TrainNeeds&) const override {
    constexpr int64_t kRows = 1024;  // as many as the largest codebook has entries
    TrainData out;
    out.x = Matrix<float>(kRows, unit.channels());
    Rng rng = Rng::from_text(fmt::format("bench/{}/{}/{}", unit.layer, unit.first_head, role_name(unit.role)));
    for (int64_t i = 0; i < out.x.rows * out.x.cols; ++i) out.x.data()[i] = static_cast<float>(rng.normal());
    for (int32_t r = 0; r < kRows; ++r) {
      out.position.push_back(r);
      out.document.push_back(0);
    }
    return out;
  }
};

struct Case {
  std::string name;
  Json codec;
  double key_macs, value_macs;  // of the encoder, a vector of `d` channels
};

std::vector<Case> cases(double d) {
  return {{"pq 16x256", {{"name", "pq"}, {"codebooks", 16}, {"bits", 8}, {"iterations", 1}}, 256 * d, 256 * d},
          {"rvq 16x256 beam 5",
           {{"name", "rvq"},
            {"codebooks", 16},
            {"bits", 8},
            {"encoding", "beam"},
            {"beam", 5},
            {"refine", 0},
            {"iterations", 1}},
           (1 + 15 * 5) * 256 * d,
           (1 + 15 * 5) * 256 * d},
          {"vqkv k 28x1024 v 8x512",
           {{"name", "simvq"},
            {"share", "heads"},
            {"rounds", 1},
            {"points", 1},
            {"k", {{"codebooks", 28}, {"bits", 10}}},
            {"v", {{"codebooks", 8}, {"bits", 9}}}},
           28 * 1024 * d,
           8 * 512 * d}};
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t context = argc > 1 ? std::atoll(argv[1]) : 1024;
  const int rounds = argc > 2 ? std::atoi(argv[2]) : 3;
  const std::vector<std::string> wanted(argv + std::min(argc, 3), argv + argc);
  const char* path = std::getenv("VQKV_MODEL");
  const auto model = load_model(path ? path : VQKV_SOURCE_DIR "/data/models/SmolLM2-135M-Instruct.Q4_1.gguf");
  const ModelFacts& facts = model->facts();
  const CacheShape shape = facts.cache_shape();
  if (context < 128 || rounds < 1) {
    std::fprintf(stderr, "usage: bench_replay [CONTEXT >= 128] [ROUNDS >= 1] [CODEC...]\n");
    return 2;
  }

  std::vector<Case> chosen;
  for (auto& c : cases(shape.head_dim))
    if (wanted.empty() ||
        std::any_of(wanted.begin(), wanted.end(), [&](const std::string& w) { return c.name.rfind(w, 0) == 0; }))
      chosen.push_back(std::move(c));
  CachePolicy policy;
  policy.k = policy.v = {1, 1};
  std::vector<ReplayCandidate> candidates;
  for (const Case& c : chosen) {
    TrainOptions options;
    options.cell = "bench";
    options.model_hash = facts.hash;
    candidates.push_back({.label = c.name,
                          .codecs = train_codec_set(resolve_codec(c.codec, shape), shape, RandomRows(), options),
                          .policy = policy});
  }
  const bool bos = model->tokenizer().special().add_bos;
  std::vector<ReplayText> texts(1);
  Rng rng(1);
  for (int64_t i = 0; i < context - bos; ++i)
    texts[0].tokens.push_back(static_cast<int32_t>(rng.below(static_cast<uint64_t>(facts.vocab))));

  std::vector<double> exact;
  std::map<std::string, std::vector<double>> total, ratio, encode, attend;
  ReplayResult last;
  replay(*model, texts, candidates, {.context = 128});  // untimed: pages, packed weights, rotation tables
  for (int r = 0; r < rounds; ++r) {
    last = replay(*model, texts, candidates, {.context = context});
    exact.push_back(last.exact_seconds);
    for (const ReplayTrack& t : last.tracks) {
      total[t.label].push_back(t.model_seconds);
      ratio[t.label].push_back(last.exact_seconds / t.model_seconds);
      encode[t.label].push_back(t.encode_seconds);
      attend[t.label].push_back(t.attend_seconds);
    }
  }
  const auto median = [](const std::vector<double>& x) { return quantile(x, 0.5); };
  const double tokens = static_cast<double>(context);
  // Tied heads are in `parameters` once; a head of its own leaves the embedding as a look-up.
  const double model_macs =
      static_cast<double>(facts.parameters) - (facts.tied_head ? 0.0 : static_cast<double>(facts.vocab) * facts.hidden);
  Json rows = Json::array();
  rows.push_back(
      {{"codec", "exact"}, {"tokens_per_s", tokens / median(exact)}, {"ratio", 1.0}, {"seconds", median(exact)}});
  for (size_t c = 0; c < chosen.size(); ++c) {
    const std::string& name = chosen[c].name;
    const double macs = (chosen[c].key_macs + chosen[c].value_macs) * shape.layers * shape.kv_heads;
    const double coded = tokens - static_cast<double>(policy.sinks);
    rows.push_back({{"codec", name},
                    {"path", last.tracks[c].path},
                    {"tokens_per_s", tokens / median(total[name])},
                    {"ratio", median(ratio[name])},
                    {"seconds", median(total[name])},
                    {"encode_s", median(encode[name])},
                    {"attend_s", median(attend[name])},
                    {"encode_mmac_per_token", macs / 1e6},
                    {"encode_over_model_macs", macs / model_macs},
                    {"ratio_by_arithmetic", model_macs / (model_macs + macs)},
                    {"encode_gmac_per_s", macs * coded / median(encode[name]) / 1e9},
                    {"bytes_of_codes", last.tracks[c].bytes.codes}});
  }
  const Json out = {{"bench", "replay"},
                    {"model", facts.name},
                    {"cpu", cpu_model_name()},
                    {"threads", thread_count()},
                    {"context", context},
                    {"rounds", rounds},
                    {"model_mmac_per_token", model_macs / 1e6},
                    {"codebooks", "trained on random rows: speed only"},
                    {"rows", rows}};
  std::fputs((out.dump(1) + "\n").c_str(), stdout);
  return 0;
}
