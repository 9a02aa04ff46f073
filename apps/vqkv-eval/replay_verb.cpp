#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>

#include "common/tool.h"
#include "core/clock.h"
#include "core/log.h"
#include "core/thread_pool.h"
#include "core/version.h"
#include "io/atomic_file.h"
#include "metric/kld.h"
#include "verbs.h"

namespace vqkv::eval {
namespace {

const std::vector<Column>& columns() {
  static const std::vector<Column> all{{"codec", "codec", "", false},
                                       {"mode", "mode", "", false},
                                       {"path", "path", "", false},
                                       {"bits_per_value", "bits/value", "{:.3f}"},
                                       {"kld.last_quarter", "KLD last 1/4", "{:.5f}"},
                                       {"kld.last_quarter.error", "±", "{:.5f}"},
                                       {"coded_mass.last_quarter", "coded mass", "{:.3f}"},
                                       {"kld.mean", "KLD", "{:.5f}"},
                                       {"kld.p99", "p99", "{:.4f}"},
                                       {"ppl", "PPL", "{:.4f}"},
                                       {"ppl.ratio", "PPL ratio", "{:.5f}"},
                                       {"ppl.ratio.error", "±", "{:.5f}"},
                                       {"same_top", "same top", "{:.4f}"},
                                       {"delta_p.rms", "Δp rms", "{:.4f}"},
                                       {"bits_per_byte", "bits/byte", "{:.4f}"},
                                       {"time_ratio", "time / exact", "{:.2f}"}};
  return all;
}

Json row_of(const ReplayResult& r, const ReplayTrack& t, const ReplayCandidate& c, const ReplayVerb& v, const CacheShape& shape) {
  Json row = {{"codec", c.label}, {"mode", replay_mode_name(c.mode)}, {"path", t.path}};
  for (const Measurement& m : kld_block(r, t, v.context)) {
    row[m.tag] = m.value;
    if (m.stderr_ > 0) row[m.tag + ".error"] = m.stderr_;
  }
  row["bits_per_value"] = bits_per_value(t.bytes, shape, v.context, 0);
  row["bytes"] = t.bytes.to_json();
  row["peak_cache_bytes"] = t.peak_cache_bytes;
  row["seconds"] = {{"total", t.model_seconds}, {"encode", t.encode_seconds}, {"attend", t.attend_seconds}, {"exact", r.exact_seconds}};
  row["time_ratio"] = r.exact_seconds > 0 ? t.model_seconds / r.exact_seconds : 0;
  Json flips = Json::array();
  for (const int32_t f : t.flips) flips.push_back(f < 0 ? Json() : Json(f));
  row["first_flip"] = flips;
  for (const Bucket& b : position_buckets(r, t.kld, v.context, v.buckets))
    row["buckets"].push_back({{"first", b.first}, {"last", b.last}, {"n", b.n}, {"kld", b.mean}, {"error", b.error}});
  row["cache"] = {{"sinks", c.policy.sinks},
                  {"k", {{"window", c.policy.k.window}, {"flush", c.policy.k.flush}}},
                  {"v", {{"window", c.policy.v.window}, {"flush", c.policy.v.flush}}},
                  {"exact_dtype", dtype_name(c.policy.exact_dtype)}};
  row["config"] = c.codecs->config();
  return row;
}

// Every pair of codecs (not the self-noise row), with the interval corrected for the number of pairs.
Json comparisons_of(const ReplayResult& r, std::span<const ReplayCandidate> candidates, size_t first, const ReplayVerb& v) {
  const size_t count = candidates.size() - first;
  const int pairs = static_cast<int>(count * (count - 1) / 2);
  Json out = Json::array();
  for (size_t a = first; a < candidates.size(); ++a)
    for (size_t b = a + 1; b < candidates.size(); ++b)
      for (const auto& d : compare_tracks(r, r.tracks[a], r.tracks[b], v.context, pairs))
        out.push_back({{"a", d.a}, {"b", d.b}, {"what", d.what}, {"mean", d.mean}, {"low", d.interval.low}, {"high", d.interval.high},
                       {"verdict", d.better < 0 ? "a is better" : d.better > 0 ? "b is better" : "not told apart"}});
  return out;
}

}  // namespace

int run_replay(const ReplayVerb& v) {
  const auto model = open_model(v.common);
  const auto texts = read_texts(v.text, model->tokenizer());
  const CacheShape shape = model->facts().cache_shape();
  const ReplayMode mode = replay_mode_from_name(v.mode);

  std::vector<ReplayCandidate> candidates;
  size_t first_codec = 0;
  if (v.self_noise) {
    // Exact against exact, rounded another way: what no codec can be told apart from.
    candidates.push_back({.label = "self-noise (exact, other blocks)", .codecs = exact_codec_set(shape), .policy = CachePolicy::exact(),
                          .attention = v.common.attention, .mode = ReplayMode::kForced, .block = std::max<int64_t>(1, v.block / 2 - 3)});
    first_codec = 1;
  }
  for (const auto& codec : load_codecs(v.common, model->facts())) {
    const auto add = [&](const std::string& label, const CachePolicy& policy) {
      candidates.push_back({.label = label, .codecs = codec.codecs, .policy = policy, .attention = v.common.attention, .mode = mode, .block = v.block});
    };
    add(codec.label, codec.policy);
    if (v.no_window_rows && codec.policy.codes && mode != ReplayMode::kFakeQuant) add(codec.label + " (no window)", without_window(codec));
  }
  if (!candidates.empty() && candidates[0].codecs && first_codec == 1 && candidates.size() > 1)
    candidates[0].policy = CachePolicy::exact(candidates[1].policy.exact_dtype);

  const ReplayOptions options{.context = v.context, .windows = v.windows, .prompt = v.prompt};
  const ReplayResult result = replay(*model, texts, candidates, options, [] { return interrupted(); });
  if (result.windows == 0) return kExitOk;  // interrupted before the first window

  Table table{columns(), {}};
  for (size_t c = 0; c < candidates.size(); ++c) table.rows.push_back(row_of(result, result.tracks[c], candidates[c], v, shape));
  const Json facts = {{"model", model->facts().name}, {"model_hash", model->facts().hash}, {"texts", v.text.texts}, {"context", v.context},
                      {"windows", result.windows}, {"positions", result.position.size()}, {"bos", result.bos}, {"weights", v.common.weights},
                      {"threads", thread_count()}, {"command", v.common.command}, {"time", utc_now()}, {"tool", version_facts()}};
  const Json comparisons = comparisons_of(result, candidates, first_codec, v);
  const Json full = {{"facts", facts}, {"rows", table.rows}, {"comparisons", comparisons}};
  if (!v.out.empty()) write_file(v.out, full.dump(1) + "\n");
  if (v.common.format == TableFormat::kJson) {
    std::fputs((full.dump(2) + "\n").c_str(), stdout);
    return kExitOk;
  }
  print(table, v.common.format);
  if (v.common.format != TableFormat::kMarkdown) return kExitOk;
  std::fputs(fmt::format("\n{} windows of {} tokens, {} scored positions (every token of a window but its first); {}. "
                         "Errors are over windows. Bits per value: bytes resident at the end of a window, books apart.\n",
                         result.windows, v.context, result.position.size(),
                         result.bos ? "each window starts with BOS, as the model adds one" : "no BOS, as the model adds none").c_str(), stdout);
  for (const auto& c : comparisons)
    if (c["what"] == "kld.last_quarter" || (c["what"] == "kld" && v.context < 8))
      std::fputs(fmt::format("{} - {}: KLD last quarter {:+.6f} [{:.6f}, {:.6f}] -> {}\n", c["a"].get<std::string>(), c["b"].get<std::string>(),
                             c["mean"].get<double>(), c["low"].get<double>(), c["high"].get<double>(), c["verdict"].get<std::string>()).c_str(), stdout);
  return kExitOk;
}

}  // namespace vqkv::eval
