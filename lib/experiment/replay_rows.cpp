#include "experiment/replay_rows.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <filesystem>
#include <numeric>
#include <unordered_set>

#include "attention/provided.h"
#include "core/error.h"
#include "experiment/protocol.h"
#include "io/trace.h"

namespace vqkv {
namespace {

// Hashes of every run of kRun tokens; a text of its own rarely shares one with another.
constexpr size_t kRun = 32;
template <class Use>
void for_runs(std::span<const int32_t> ids, size_t step, Use&& use) {
  for (size_t at = 0; at + kRun <= ids.size(); at += step) {
    uint64_t h = 1469598103934665603u;  // FNV-1a over whole ids
    for (size_t i = 0; i < kRun; ++i)
      h = (h ^ static_cast<uint64_t>(static_cast<uint32_t>(ids[at + i]))) * 1099511628211u;
    use(h);
  }
}

}  // namespace

std::string protocol_of(const ReplayCandidate& c) {
  if (!c.policy.codes) return protocol_text(c.policy);
  if (c.mode == ReplayMode::kFakeQuant)  // no window at all: every key and value beyond the sinks is its code
    return protocol_text({.sinks = c.policy.sinks, .k = {0, 1}, .v = {0, 1}});
  return (c.mode == ReplayMode::kPrefillExact ? "exact prompt, then " : "") +
         protocol_text(c.policy, c.codecs ? c.codecs->config() : Json());
}

ReplayCandidate self_noise(const CacheShape& shape, DType exact_dtype, const std::string& attention, int64_t block) {
  // A device keeps no f32.
  const DType wide = attention == kDeviceAttention ? DType::kBF16 : DType::kF32;
  const DType other = exact_dtype == wide ? DType::kF16 : wide;
  return {.label = fmt::format("self-noise (exact in {})", dtype_name(other)),
          .codecs = exact_codec_set(shape),
          .policy = CachePolicy::exact(other),
          .attention = attention,
          .mode = ReplayMode::kForced,
          .block = std::max<int64_t>(1, block / 2 - 3)};
}

CachePolicy without_window(const CodecSet& codecs, CachePolicy policy) {
  std::array<int64_t, 2> block{1, 1};
  for (const auto& u : codecs.units()) {
    int64_t& b = block[static_cast<size_t>(u.spec.unit.role)];
    b = std::lcm(b, static_cast<int64_t>(u.codec->layout().block_tokens));
  }
  policy.k = {1, block[0]};
  policy.v = {1, block[1]};
  return policy;
}

std::optional<CachePolicy> streaming_beside(CachePolicy policy) {
  const FlushRule &k = policy.k, &v = policy.v;
  if (!policy.keeps_codes() || policy.codes_images || policy.prompt > 0 || k.window != v.window || k.flush != v.flush ||
      k.window < 1)
    return std::nullopt;
  policy.drops = true;
  policy.keep = nullptr;
  return policy;
}

std::string no_streaming_beside(const CachePolicy& policy) {
  if (!policy.keeps_codes() || streaming_beside(policy)) return "";
  return fmt::format("{}: {}, so no row says what its window does alone", protocol_text(policy),
                     policy.codes_images                          ? "no window slides over an image"
                     : policy.prompt > 0                          ? "no window slides over the prompt"
                     : policy.k.window < 1 && policy.v.window < 1 ? "there is no window"
                                                                  : "keys and values leave by rules of their own");
}

std::vector<std::string> Learned::flags(int64_t context) const {
  std::vector<std::string> out;
  if (!known) out.push_back("training unknown");
  if (seen > 0) out.push_back("trained on these texts");
  if (positions > 0 && positions < context) out.push_back("extrapolated");
  return out;
}

Learned what_it_learned(const CodecSet& codecs, const Json& origin, std::span<const ReplayText> texts) {
  Learned out;
  const auto& units = codecs.units();
  if (std::none_of(units.begin(), units.end(), [](const TrainedUnit& u) { return u.report.vectors > 0; })) {
    out.known = true;
    return out;
  }
  if (!origin.is_object() || !origin.at("path").is_string() || !origin.at("train").is_array() ||
      !std::filesystem::exists(origin.at("path").get<std::string>()))
    return out;
  const TraceReader trace(origin.at("path").get<std::string>());
  if (origin.at("hash") != trace.info().content_hash) return out;
  out.known = true;
  const Json& train = origin.at("train");
  std::unordered_set<uint64_t> trained;
  for (const TraceWindow& w : trace.windows()) {
    if (std::find(train.begin(), train.end(), Json(w.document)) == train.end()) continue;
    for_runs(std::span(trace.token_id()).subspan(static_cast<size_t>(w.first_token), static_cast<size_t>(w.tokens)), 1,
             [&](uint64_t h) { trained.insert(h); });
    for (int64_t i = 0; i < w.tokens; ++i)
      out.positions = std::max<int64_t>(out.positions, trace.position()[static_cast<size_t>(w.first_token + i)] + 1);
  }
  int64_t runs = 0, seen = 0;
  for (const ReplayText& t : texts)
    for_runs(t.tokens, kRun, [&](uint64_t h) {
      ++runs;
      seen += trained.contains(h);
    });
  out.seen = runs > 0 ? static_cast<double>(seen) / static_cast<double>(runs) : 0;
  return out;
}

bool ReplayRow::codes_nothing(int64_t context) const {
  CachePolicy policy = candidate.policy;
  if (candidate.codecs) policy = policy.for_codecs(*candidate.codecs);
  int64_t queries = context - 1;  // the last one of a window predicts nothing
  if (candidate.mode == ReplayMode::kFakeQuant && policy.keeps_codes()) {
    policy = without_window(*candidate.codecs, policy);
    policy.k.window = policy.v.window = 0;
    policy.codes_generated = true;
    queries = context;  // its codes are there all the same
  }
  return !vqkv::codes_nothing(policy, queries).empty();
}

std::vector<std::string> ReplayRow::flags(const ReplayTrack& track, int64_t context) const {
  std::vector<std::string> out = learned.flags(context);
  if (codes_nothing(context)) out.push_back("nothing-coded");
  if (candidate.codecs && off_label(*candidate.codecs, candidate.policy)) out.push_back("off-label");
  if (candidate.codecs && quantizes_queries(*candidate.codecs, candidate.policy)) out.push_back("quantized-query");
  if (candidate.policy.keep && !track.gave_up) out.push_back("policy gave nothing up");
  return out;
}

std::vector<ReplayRow> replay_rows(std::span<const LoadedCodec> codecs, const CacheShape& shape,
                                   std::span<const ReplayText> texts, const ReplayRowOptions& options) {
  VQKV_CHECK(!codecs.empty());
  const bool fake = options.mode == ReplayMode::kFakeQuant;
  ReplayCandidate common;
  common.attention = options.attention;
  common.mode = options.mode;
  common.block = options.block;
  std::vector<ReplayRow> rows{
      {.candidate = self_noise(shape, codecs[0].policy.exact_dtype, options.attention, options.self_noise_block)}};
  for (const LoadedCodec& codec : codecs) {
    ReplayRow row{common, ReplayRow::Kind::kCodec,
                  codec.exec ? Learned{} : what_it_learned(*codec.codecs, codec.origin, texts)};
    const auto add = [&](const std::string& label, const CachePolicy& policy, std::shared_ptr<const ExecCodec> exec) {
      row.candidate.label = label;
      row.candidate.codecs = exec ? exec->codecs() : codec.codecs;
      row.candidate.policy = policy;
      row.exec = exec;
      if (exec) row.candidate.claimed_bytes = [exec] { return exec->claimed_bytes(); };
      rows.push_back(row);
    };
    add(codec.label, codec.policy, codec.exec);
    if (!options.windowless || fake || !codec.policy.keeps_codes() || codec.policy.codes_images) continue;
    row.kind = ReplayRow::Kind::kWindowless;
    const CachePolicy bare = without_window(*codec.codecs, codec.policy);
    add(codec.label + " (no window)", bare, codec.exec ? codec.exec->under(bare) : nullptr);
  }

  // What a window does alone, once a protocol: a codec's row says little where this one is near it.
  int streaming = 0;
  for (const LoadedCodec& codec : codecs) {
    const auto policy = fake ? std::nullopt : streaming_beside(codec.policy);
    const auto same = [&](const ReplayRow& r) {
      return protocol_text(r.candidate.policy) == protocol_text(*policy) &&
             r.candidate.policy.exact_dtype == policy->exact_dtype;
    };
    if (!policy || std::ranges::any_of(rows, same)) continue;
    rows.push_back({.candidate = common});
    ReplayCandidate& alone = rows.back().candidate;
    alone.label = ++streaming == 1 ? "streaming" : fmt::format("streaming #{}", streaming);
    alone.codecs = exact_codec_set(shape);
    alone.policy = *policy;
  }
  return rows;
}

std::vector<ReplayCandidate> candidates_of(std::span<const ReplayRow> rows) {
  std::vector<ReplayCandidate> out;
  for (const ReplayRow& row : rows) out.push_back(row.candidate);
  return out;
}

std::vector<PairedDifference> compare_rows(const ReplayResult& result, std::span<const ReplayRow> rows,
                                           int64_t context) {
  std::vector<std::pair<size_t, size_t>> pairs;
  for (size_t a = 0; a < rows.size(); ++a)
    for (size_t b = a + 1; b < rows.size(); ++b)
      if (rows[a].kind == rows[b].kind && rows[a].kind != ReplayRow::Kind::kProtocol) pairs.emplace_back(a, b);
  return compare_tracks(result, pairs, context);
}

}  // namespace vqkv
