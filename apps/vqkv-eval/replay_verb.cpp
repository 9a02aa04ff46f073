#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <optional>

#include "common/tool.h"
#include "core/clock.h"
#include "core/log.h"
#include "core/thread_pool.h"
#include "core/version.h"
#include "experiment/protocol.h"
#include "experiment/replay_rows.h"
#include "generation/replay_statistics.h"
#include "io/atomic_file.h"
#include "verbs.h"

namespace vqkv::eval {
namespace {

constexpr char kNoWindow[] = " (no window)";

// Between what a row is and what it took: what its measurements say of themselves.
std::vector<Column> columns(const ReplayVerb& v, const std::vector<MeasureColumn>& measured) {
  std::vector<Column> all{{"codec", "codec", "", false},
                          {"mode", "mode", "", false},
                          {"protocol", "protocol", "", false},
                          {"path", "path", "", false}};
  for (const Column& c : bits_columns()) all.push_back(c);
  for (const MeasureColumn& c : measured) {
    if (!c.group.empty() && std::find(v.metrics.begin(), v.metrics.end(), c.group) == v.metrics.end()) continue;
    all.push_back({c.tag, c.title, fmt::format("{{:.{}g}}", c.digits)});
    if (c.error) all.push_back({c.tag + ".error", "±", "{:.2g}"});
  }
  all.push_back({"time_ratio", "time / exact", "{:.2f}"});
  return all;
}

Json row_of(const ReplayResult& r, const ReplayTrack& t, const ReplayCandidate& c, const ReplayVerb& v,
            const CacheShape& shape, std::vector<MeasureColumn>& measured) {
  Json row = {{"codec", c.label}, {"mode", replay_mode_name(c.mode)}, {"protocol", protocol_of(c)}, {"path", t.path}};
  for (const Measurement& m : kld_block(r, t, v.context)) {
    row[m.tag] = std::isfinite(m.value) ? Json(m.value) : Json();
    if (m.stderr_ > 0) row[m.tag + ".error"] = m.stderr_;
    add_column(measured, m);
  }
  add_bits(row, t.bytes, shape, v.context, c.codecs->config(), t.claimed_bytes);
  row["bytes"] = t.bytes.to_json();
  row["peak_cache_bytes"] = t.peak_cache_bytes;
  row["seconds"] = {{"total", t.model_seconds},
                    {"encode", t.encode_seconds},
                    {"attend", t.attend_seconds},
                    {"exact", r.exact_seconds}};
  row["time_ratio"] = r.exact_seconds > 0 ? t.model_seconds / r.exact_seconds : 0;
  Json flips = Json::array();
  for (const int32_t f : t.flips) flips.push_back(f < 0 ? Json() : Json(f));
  row["first_flip"] = flips;
  row["buckets"] = Json::array();
  for (const Bucket& b : position_buckets(r, t.kld, v.context, v.buckets))
    row["buckets"].push_back({{"first", b.first},
                              {"last", b.last},
                              {"n", b.n},
                              {"kld", b.n > 0 ? Json(b.mean) : Json()},
                              {"error", std::isfinite(b.error) ? Json(b.error) : Json()}});
  row["cache"] = {{"sinks", c.policy.sinks},
                  {"k", {{"window", c.policy.k.window}, {"flush", c.policy.k.flush}}},
                  {"v", {{"window", c.policy.v.window}, {"flush", c.policy.v.flush}}},
                  {"exact_dtype", dtype_name(c.policy.exact_dtype)}};
  row["config"] = c.codecs->config();
  return row;
}

// Every pair of codecs under the same kind of policy (windowed with windowed); verdicts are corrected over all of them.
// Rows of the protocol (self-noise, streaming) are no codecs.
Json comparisons_of(const ReplayResult& r, std::span<const ReplayCandidate> candidates, size_t first, size_t last,
                    const ReplayVerb& v) {
  const auto windowless = [&](size_t c) { return candidates[c].label.ends_with(kNoWindow); };
  std::vector<std::pair<size_t, size_t>> pairs;
  for (size_t a = first; a < last; ++a)
    for (size_t b = a + 1; b < last; ++b)
      if (windowless(a) == windowless(b)) pairs.emplace_back(a, b);
  const auto rows = compare_tracks(r, pairs, v.context);
  const std::string cluster = replay_clusters(r).name;
  Json out = Json::array();
  for (const auto& d : rows)
    out.push_back({{"a", r.tracks[d.a].label},
                   {"b", r.tracks[d.b].label},
                   {"what", d.what},
                   {"mean", d.mean},
                   {"windowless", windowless(d.a)},
                   {"low", std::isfinite(d.interval.low) ? Json(d.interval.low) : Json()},
                   {"high", std::isfinite(d.interval.high) ? Json(d.interval.high) : Json()},
                   {"p", d.p},
                   {"p_corrected", d.corrected},
                   {"comparisons", rows.size()},
                   {"clusters", d.clusters},
                   {"clusters_needed", d.needed},
                   {"cluster", cluster},
                   {"told_apart", d.better ? Json(*d.better != 0) : Json()},
                   {"verdict", verdict(d, cluster)}});
  return out;
}

}  // namespace

int run_replay(const ReplayVerb& v) {
  const ReplayMode mode = replay_mode_from_name(v.mode);
  if (v.prompt > 0 && mode != ReplayMode::kPrefillExact)
    fail_usage(fmt::format("--prompt {}: only --mode prefill-exact tells a prompt from the rest; --mode is {}",
                           v.prompt, v.mode));
  const auto model = open_model(v.common);
  const auto texts = read_texts(v.text, *model);
  const CacheShape shape = model->facts().cache_shape();
  const int64_t block = mode == ReplayMode::kStepwise ? 1 : v.block;
  const auto codecs = load_codecs(v.common, model->facts());
  if (codecs.empty()) return kExitOk;  // interrupted
  const DType exact_dtype = codecs[0].policy.exact_dtype;

  std::vector<ReplayCandidate> candidates{self_noise(shape, exact_dtype, v.common.attention, v.block)};
  constexpr size_t kFirstCodec = 1;
  std::vector<Learned> learned{{.known = true}};  // a candidate
  for (const auto& codec : codecs) {
    if (codec.policy.exact_dtype != exact_dtype)
      log_warning(fmt::format("{} keeps its exact rows as {}, the exact cache as {}", codec.label,
                              dtype_name(codec.policy.exact_dtype), dtype_name(exact_dtype)));
    const Learned from = codec.exec ? Learned{} : what_it_learned(*codec.codecs, codec.origin, texts);
    if (!from.known)
      log_warning(fmt::format("{}: {}, so nobody can say whether it was trained on these texts", codec.label,
                              codec.exec ? "it is another program" : "its trace is gone"));
    if (from.seen > 0)
      log_warning(fmt::format("{}: {:.0f} % of these texts stand in its train documents; its rows say so", codec.label,
                              100 * from.seen));
    if (from.positions > 0 && from.positions < v.context)
      log_warning(fmt::format("{}: trained on positions below {}, replayed up to {}; its rows say extrapolated",
                              codec.label, from.positions, v.context));
    const auto add = [&](const std::string& label, const CachePolicy& policy, std::shared_ptr<const ExecCodec> exec) {
      learned.push_back(from);
      candidates.push_back({.label = label,
                            .codecs = exec ? exec->codecs() : codec.codecs,
                            .policy = policy,
                            .attention = v.common.attention,
                            .mode = mode,
                            .block = block});
      if (exec) candidates.back().claimed_bytes = [exec] { return exec->claimed_bytes(); };
    };
    add(codec.label, codec.policy, codec.exec);
    if (v.no_window_rows && codec.policy.keeps_codes() && mode != ReplayMode::kFakeQuant) {
      const CachePolicy policy = without_window(*codec.codecs, codec.policy);
      add(codec.label + kNoWindow, policy, codec.exec ? codec.exec->under(policy) : nullptr);
    }
  }

  // What a window does alone, once a protocol: a codec's row says little where this one is near it.
  const size_t last_codec = candidates.size();
  for (const auto& codec : codecs) {
    const auto policy = mode == ReplayMode::kFakeQuant ? std::nullopt : streaming_beside(codec.policy);
    const auto same = [&](const ReplayCandidate& c) {
      return protocol_text(c.policy) == protocol_text(*policy) && c.policy.exact_dtype == policy->exact_dtype;
    };
    if (!policy || std::any_of(candidates.begin(), candidates.end(), same)) continue;
    const size_t before = candidates.size() - last_codec;
    learned.push_back({.known = true});
    candidates.push_back({.label = before == 0 ? "streaming" : fmt::format("streaming #{}", before + 1),
                          .codecs = exact_codec_set(shape),
                          .policy = *policy,
                          .attention = v.common.attention,
                          .mode = mode,
                          .block = block});
  }

  const ReplayOptions options{.context = v.context,
                              .windows = v.windows,
                              .prompt = v.prompt,
                              .block = block,
                              .exact_dtype = exact_dtype,
                              .attention = v.common.attention};
  const ReplayResult result = replay(*model, texts, candidates, options, [] { return interrupted(); });
  if (interrupted()) log_warning(fmt::format("interrupted; the numbers are of the first {} windows", result.windows));
  if (result.windows == 0) return kExitOk;

  Table table;
  bool flagged = false;
  std::vector<MeasureColumn> measured;
  for (size_t c = 0; c < candidates.size(); ++c) {
    Json row = row_of(result, result.tracks[c], candidates[c], v, shape, measured);
    row["seen_in_training"] = learned[c].known ? Json(learned[c].seen) : Json();
    auto flags = learned[c].flags(v.context);
    if (candidates[c].policy.keep && !result.tracks[c].gave_up) flags.push_back("policy gave nothing up");
    row["flags"] = flags;
    if (!flags.empty()) row["flag_text"] = fmt::format("{}", fmt::join(flags, ", "));
    table.rows.push_back(std::move(row));
    flagged = flagged || !flags.empty();
  }
  table.columns = columns(v, measured);
  if (flagged) table.columns.push_back({"flag_text", "flags", "", false});
  const std::string scored = result.prompt > 0 ? fmt::format("every token after the prompt of {}", result.prompt)
                                               : "every token of a window but its first";
  const std::string bos = result.bos                ? "each window starts with BOS, as the model adds one"
                          : model->find_tokenizer() ? "no BOS, as the model adds none"
                                                    : "no BOS, as there is no tokenizer to name one";
  Json documents = Json::array();
  for (const auto& t : texts) documents.push_back({{"name", t.name}, {"tokens", t.tokens.size()}});
  const Json facts = {{"model", model->facts().name},
                      {"model_hash", model->facts().hash},
                      {"documents", documents},
                      {"context", v.context},
                      {"windows", result.windows},
                      {"positions", result.position.size()},
                      {"scored", scored},
                      {"bos", result.bos},
                      {"weights", model->weights()},
                      {"exact_dtype", dtype_name(exact_dtype)},
                      {"exact_path", result.exact_path},
                      {"block", block},
                      {"threads", thread_count()},
                      {"interrupted", interrupted()},
                      {"command", v.common.command},
                      {"time", utc_now()},
                      {"tool", version_facts()}};
  const Json comparisons = comparisons_of(result, candidates, kFirstCodec, last_codec, v);
  const Json full = {{"facts", facts}, {"rows", table.rows}, {"comparisons", comparisons}};
  if (!v.out.empty()) write_file(v.out, full.dump(1) + "\n");
  if (!print(table, v.common.format, full)) return kExitOk;
  const ReplayClusters clusters = replay_clusters(result);
  std::string notes = fmt::format(
      "\n{} window{} of {} tokens, {} scored positions ({}); {}. Errors (±) are over {} {}{}. Bits a value: all bytes "
      "resident at the end of a window, over all cached values; then with codebooks and other constants shared by 1 "
      "and "
      "by 64 sequences. Coded mass: share of the attention in the last quarter that fell on coded keys.\n",
      result.windows, result.windows == 1 ? "" : "s", v.context, result.position.size(), scored, bos, clusters.count,
      clusters.name, clusters.count == 1 ? "" : "s");
  if (clusters.count < 2)
    notes += "One window gives no errors and no intervals; take more with --windows or longer or more texts.\n";
  if (std::any_of(result.tracks.begin(), result.tracks.end(), [](const auto& t) { return t.claimed_bytes; }))
    notes +=
        "Claimed: exact sinks and window as held, and what another program says its codes take; the cache held its "
        "rows "
        "in f32 (docs/exec.md).\n";
  if (!comparisons.empty())
    notes += fmt::format(
        "Paired differences, with the 95 % interval of each alone; verdicts by exact sign flips over {}s, Holm's "
        "correction over all {} comparisons (the rest is in --json).\n",
        clusters.name, comparisons.size());
  for (const auto& c : comparisons) {
    if (c["what"] != "kld.last_quarter" || c["windowless"]) continue;
    notes += fmt::format("{} - {}: KLD last 1/4 {:+.3g}", c["a"].get<std::string>(), c["b"].get<std::string>(),
                         c["mean"].get<double>());
    if (!c["low"].is_null()) notes += fmt::format(" [{:.3g}, {:.3g}]", c["low"].get<double>(), c["high"].get<double>());
    notes += fmt::format(": {}\n", c["verdict"].get<std::string>());
  }
  std::fputs(notes.c_str(), stdout);
  return kExitOk;
}

}  // namespace vqkv::eval
