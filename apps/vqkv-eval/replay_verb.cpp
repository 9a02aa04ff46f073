#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <optional>
#include <set>

#include "cache/keep_rule.h"
#include "common/tool.h"
#include "core/clock.h"
#include "core/log.h"
#include "core/names.h"
#include "core/thread_pool.h"
#include "core/version.h"
#include "experiment/replay_rows.h"
#include "generation/replay_statistics.h"
#include "io/atomic_file.h"
#include "verbs.h"

namespace vqkv::eval {
namespace {

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

// What the policy keeps how, as numbers; what has no meaning under it is left out.
Json cache_of(const CachePolicy& p) {
  Json out = {{"exact_dtype", dtype_name(p.exact_dtype)}};
  if (!p.codes) {
    out["rule"] = "none";
    return out;
  }
  out["sinks"] = p.sinks;
  for (const Role role : {Role::kKey, Role::kValue}) {
    const FlushRule& rule = p.rule(role);
    out[role_name(role)] = {{"window", rule.window}, {"flush", rule.flush}};
    if (rule.first > 0) out[role_name(role)]["first"] = rule.first;
  }
  if (p.prompt > 0) out.update({{"prompt", p.prompt}, {"generated", p.codes_generated ? "coded" : "exact"}});
  if (p.drops) out["policy"] = "streaming";
  if (p.keep) out["policy"] = p.keep->text();
  return out;
}

Json row_of(const ReplayResult& r, const ReplayTrack& t, const ReplayCandidate& c, const ReplayVerb& v,
            const CacheShape& shape, std::vector<MeasureColumn>& measured) {
  Json row = {{"codec", c.label}, {"mode", replay_mode_name(c.mode)}, {"protocol", protocol_of(c)}, {"path", t.path}};
  for (const Measurement& m : kld_block(r, t, v.context)) {
    row[m.tag] = std::isfinite(m.value) ? Json(m.value) : Json();
    if (m.stderr_ > 0) row[m.tag + ".error"] = m.stderr_;
    if (!m.per_document.empty()) row["per_document"][m.tag] = m.per_document;
    add_column(measured, m);
  }
  add_bits(row, t.bytes, shape, v.context, c.codecs->config(), t.claimed_bytes);
  row["bytes"] = t.bytes.to_json();
  row["peak_cache_bytes"] = t.peak_cache_bytes;
  row["seconds"] = {{"total", t.model_seconds},
                    {"encode", t.encode_seconds},
                    {"attend", v.common.device.on_cpu() ? Json(t.attend_seconds) : Json()},
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
  row["cache"] = cache_of(c.policy);
  row["config"] = c.codecs->config();
  return row;
}

Json comparisons_of(const ReplayResult& r, std::span<const ReplayRow> candidates, int64_t context) {
  const auto rows = compare_rows(r, candidates, context);
  const std::string cluster = replay_clusters(r).name;
  Json out = Json::array();
  for (const auto& d : rows)
    out.push_back({{"a", r.tracks[d.a].label},
                   {"b", r.tracks[d.b].label},
                   {"what", d.what},
                   {"mean", d.mean},
                   {"windowless", candidates[d.a].kind == ReplayRow::Kind::kWindowless},
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

// What a reader of the table should know before it is there.
void warn(std::span<const LoadedCodec> codecs, std::span<const ReplayRow> rows, ReplayMode mode, int64_t context) {
  warn_of_exact_rows(codecs);
  std::set<std::string> alone;  // once a protocol
  for (const LoadedCodec& codec : codecs)
    if (const std::string why = no_streaming_beside(codec.policy);
        mode != ReplayMode::kFakeQuant && !why.empty() && alone.insert(why).second)
      log_info(why);
  for (const ReplayRow& row : rows) {
    if (row.kind != ReplayRow::Kind::kCodec) continue;
    const std::string& label = row.candidate.label;
    if (row.codes_nothing(context))
      log_warning(fmt::format(
          "{}: no query of {} tokens sees a coded token, its numbers are the exact cache's; its row says nothing-coded",
          label, context));
    if (!row.learned.known)
      log_warning(fmt::format("{}: {}, so nobody can say whether it was trained on these texts", label,
                              row.candidate.claimed_bytes ? "it is another program" : "its trace is gone"));
    if (row.learned.seen > 0)
      log_warning(fmt::format("{}: {:.0f} % of these texts stand in its train documents; its rows say so", label,
                              100 * row.learned.seen));
    if (row.learned.positions > 0 && row.learned.positions < context)
      log_warning(fmt::format("{}: trained on positions below {}, replayed up to {}; its rows say extrapolated", label,
                              row.learned.positions, context));
  }
}

}  // namespace

int run_replay(const ReplayVerb& v) {
  const ReplayMode mode = replay_mode_from_name(v.mode);
  if (v.prompt > 0 && mode != ReplayMode::kPrefillExact)
    fail_usage(fmt::format("--prompt {}: only --mode prefill-exact tells a prompt from the rest; --mode is {}",
                           v.prompt, v.mode));
  refuse_twice("--metrics", v.metrics);
  if (mode == ReplayMode::kFakeQuant && !v.common.device.on_cpu())
    fail_unavailable("--mode fake-quant: on a device every query sees what its position says; --device cpu runs it");
  const auto model = open_model(v.common);
  const auto texts = read_texts(v.text, *model);
  const CacheShape shape = model->facts().cache_shape();
  const int64_t block = mode == ReplayMode::kStepwise ? 1 : v.block;
  ReplayOptions options{
      .context = v.context, .windows = v.windows, .prompt = v.prompt, .block = block, .attention = v.common.attention};
  // What can be refused is, before a codec is trained.
  require_positions(scored_positions(*model, texts, options, mode));
  std::optional<AtomicFile> out;
  if (!v.out.empty()) out.emplace(v.out);
  const auto codecs = load_codecs(v.common, model->facts());
  if (codecs.empty()) return kExitOk;  // interrupted
  if (mode == ReplayMode::kFakeQuant)
    for (const auto& codec : codecs)
      if (const auto policy = codec.cache.find("policy"); policy != codec.cache.end())
        fail_usage(
            fmt::format("--mode fake-quant: {} stands under the policy {}, which decides as the text goes on, and "
                        "fake-quant codes all tokens at once; use --mode forced, or cache.policy=all",
                        codec.label, policy->at("name").get<std::string>()));
  options.exact_dtype = codecs[0].policy.exact_dtype;

  const std::vector<ReplayRow> rows = replay_rows(codecs, shape, texts,
                                                  {.mode = mode,
                                                   .block = block,
                                                   .self_noise_block = v.block,
                                                   .attention = v.common.attention,
                                                   .windowless = v.no_window_rows});
  for (const ReplayRow& row : rows)
    require_device_form(v.common, row.candidate.label, row.candidate.codecs, row.candidate.policy,
                        row.kind == ReplayRow::Kind::kWindowless ? "; --skip-no-window leaves this row out" : "");
  warn(codecs, rows, mode, v.context);
  Programs programs;
  std::vector<HeldCaches> held;
  for (const ReplayRow& row : rows) {
    programs.add(row.exec);
    held.push_back({row.candidate.label, *row.candidate.codecs, row.candidate.policy});
  }
  const auto exact = exact_codec_set(shape);
  held.push_back({"exact", *exact, CachePolicy::exact(options.exact_dtype)});
  require_cache_memory(held, v.context);

  const ReplayResult result = replay(*model, texts, candidates_of(rows), options, [] { return interrupted(); });
  if (interrupted()) log_warning(fmt::format("the numbers are of the first {} windows", result.windows));
  if (result.windows == 0) return kExitOk;

  Table table;
  bool flagged = false;
  std::vector<MeasureColumn> measured;
  for (size_t c = 0; c < rows.size(); ++c) {
    Json row = row_of(result, result.tracks[c], rows[c].candidate, v, shape, measured);
    row["seen_in_training"] = rows[c].learned.known ? Json(rows[c].learned.seen) : Json();
    const auto flags = rows[c].flags(result.tracks[c], v.context);
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
                      {"device", v.common.device.require()},
                      {"exact_dtype", dtype_name(options.exact_dtype)},
                      {"exact_path", result.exact_path},
                      {"block", block},
                      {"threads", thread_count()},
                      {"interrupted", interrupted()},
                      {"command", v.common.command},
                      {"time", utc_now()},
                      {"tool", version_facts()}};
  const Json comparisons = comparisons_of(result, rows, v.context);
  const Json full = {{"facts", facts}, {"rows", table.rows}, {"comparisons", comparisons}};
  if (out) {
    out->write(full.dump(1) + "\n");
    out->commit();
  }
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
