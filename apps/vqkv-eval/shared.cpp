#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <map>
#include <set>

#include "attention/sequence.h"
#include "codec/codec_archive.h"
#include "common/cache_tables.h"
#include "common/tool.h"
#include "config/config.h"
#include "core/log.h"
#include "core/memory.h"
#include "experiment/cost.h"
#include "experiment/protocol.h"
#include "experiment/runner.h"
#include "verbs.h"

namespace vqkv::eval {
namespace {

const std::string kExec = "exec:";

bool ends_with(const std::string& s, const std::string& end) {
  return s.size() >= end.size() && s.compare(s.size() - end.size(), end.size(), end) == 0;
}

void require_same_model(const CodecSet& codecs, const ModelFacts& model, const std::string& what) {
  const CacheShape &have = codecs.shape(), want = model.cache_shape();
  if (have.layers != want.layers || have.q_heads != want.q_heads || have.kv_heads != want.kv_heads ||
      have.head_dim != want.head_dim)
    fail_data(fmt::format("{}: made for {} layers, {}/{} heads of {}; {} has {} layers, {}/{} heads of {}", what,
                          have.layers, have.q_heads, have.kv_heads, have.head_dim, model.name, want.layers,
                          want.q_heads, want.kv_heads, want.head_dim));
  if (!codecs.model_hash().empty() && codecs.model_hash() != model.hash)
    fail_data(
        fmt::format("{}: trained on the model with hash {}; {} has {} (another conversion or sharding of a model "
                    "counts as another model)",
                    what, codecs.model_hash(), model.name, model.hash));
  // Without a hash (a trace from elsewhere) the rotation at least must agree. 1e-5: float frequencies of other
  // programs.
  bool same = have.rope.rotary_dim == want.rope.rotary_dim &&
              have.rope.inverse_frequency.size() == want.rope.inverse_frequency.size() &&
              std::fabs(have.rope.attention_factor - want.rope.attention_factor) <= 1e-5 * want.rope.attention_factor;
  for (size_t p = 0; same && p < have.rope.inverse_frequency.size(); ++p)
    same = std::fabs(have.rope.inverse_frequency[p] - want.rope.inverse_frequency[p]) <=
           1e-5 * want.rope.inverse_frequency[p];
  if (!same)
    fail_data(fmt::format(
        "{}: made for another rotary embedding (theta {}, scaling {}, attention factor {}) than that of {} (theta {}, "
        "scaling {}, attention factor {})",
        what, have.rope.theta, have.rope.scaling, have.rope.attention_factor, model.name, want.rope.theta,
        want.rope.scaling, want.rope.attention_factor));
}

// There is no fallback inside a backend: what it can't run is said before anything runs.
void require_backend(const std::string& name, const LoadedCodec& codec) {
  if (name == "auto" || !codec.policy.keeps_codes()) return;
  const auto backend = make_attention_backend(name);
  std::set<const Codec*> seen;
  for (const TrainedUnit& u : codec.codecs->units()) {
    if (!seen.insert(u.codec.get()).second) continue;
    if (const auto reason = backend->can(u.codec->plan(), u.spec.unit.role))
      fail_unavailable(fmt::format("--attention {} can't run {}: {} of layer {}: {}", name, codec.label,
                                   role_name(u.spec.unit.role), u.spec.unit.layer, *reason));
  }
}

// Keys of a rule, which stand under k and v in a canonical section.
bool of_a_rule(const std::string& key) {
  return key == "rule" || key == "window" || key == "flush" || key == "residual";
}

// Of an assignment cache.KEY=VALUE: KEY.
std::string key_of(const std::string& assignment) {
  const std::string path = assignment.substr(0, assignment.find('='));
  return path.substr(path.find('.') + 1);
}

// Whether the rules of `cache`, which is canonical, have the keys that `assignments` set: a window under the rule kivi
// would be lost without a word.
void require_reached(const Json& cache, const std::vector<std::string>& assignments) {
  for (const std::string& assignment : assignments) {
    const std::string key = key_of(assignment);
    const bool role = key.starts_with("k.") || key.starts_with("v.");
    const bool reached = of_a_rule(key) ? cache["k"].contains(key) && cache["v"].contains(key)
                                        : !role || find_path(cache, key) != nullptr;
    if (!reached)
      fail_usage(fmt::format("'{}' has no meaning under the cache rules k: {}, v: {}; set cache.rule, too", assignment,
                             cache["k"].dump(), cache["v"].dump()));
  }
}

// `cache`, which is canonical, with all `assignments` as one change, like keys of a file: what is written for both
// roles holds for each that says nothing of its own, in whatever order.
void override_cache(Json& cache, std::vector<std::string> assignments) {
  std::ranges::stable_partition(assignments, [&](const std::string& a) { return of_a_rule(key_of(a)); });
  Config config;
  config.tree["cache"] = cache;
  Json& after = config.tree["cache"];
  for (const std::string& assignment : assignments) {
    apply_override(config, assignment);
    const std::string key = key_of(assignment);
    if (!of_a_rule(key)) continue;
    for (const char* role : {"k", "v"}) after[role][key] = after[key];
    after.erase(key);
  }
  cache = annotated(config, [&] { return canonical_cache_config(after); });
  require_reached(cache, assignments);
}

// The cache.* among overrides, applied; `others` says why there may be none but them.
void apply_cache_overrides(Json& cache, const std::vector<std::string>& overrides, const std::string& others) {
  for (const auto& o : overrides)
    if (!o.starts_with("cache.")) fail_usage(fmt::format("'{}': {}", o, others));
  override_cache(cache, overrides);
}

LoadedCodec load_archive(const std::string& path, const CommonOptions& common, const ModelFacts& model) {
  LoadedCodec out;
  const std::string name = std::filesystem::path(path).filename().string();
  out.label = file_label(path, name.substr(0, name.find(".codec.h5")));
  Json facts;
  out.codecs = std::make_shared<const CodecSet>(load_codec_set(path, &facts));
  require_same_model(*out.codecs, model, path);
  if (const Json* trace = find_path(facts, "config.trace"); trace && trace->is_object() && facts.contains("trace"))
    out.origin = {
        {"path", trace->value("path", Json())}, {"train", trace->value("train", Json())}, {"hash", facts["trace"]}};
  if (!facts.contains("cache")) log_warning(fmt::format("{}: names no cache section; the default one is used", path));
  try {
    out.cache = canonical_cache_config(facts.value("cache", Json::object()));
  } catch (const Error& e) { fail_data(fmt::format("{}: {}", path, e.what())); }
  apply_cache_overrides(out.cache, common.overrides,
                        "a frozen codec takes only cache.* overrides; the rest of its configuration is trained in");
  return out;
}

LoadedCodec train_cell_file(const std::string& path, const CommonOptions& common, const ModelFacts& model) {
  Config config = load_config(path);
  for (const auto& o : common.overrides) apply_override(config, o);
  LoadedCodec out;
  out.label = file_label(path, std::filesystem::path(path).stem().string());
  if (auto untraced = make_untraced_cell(config, model.cache_shape(), model.hash)) {
    check_cell_file(untraced->config, path, common);
    out.codecs = untraced->codecs;
    out.cache = untraced->config.cache;
    return out;
  }
  const Json cell = make_cell(config);
  const CellConfig typed = config_of(cell);
  check_cell_file(typed, path, common);
  log_info(fmt::format("training {} on {}", path, typed.trace));
  out.codecs = codecs_of_cell(cell, [] { return interrupted(); });
  if (!out.codecs) return out;
  require_same_model(*out.codecs, model, path);
  out.cache = typed.cache;
  out.origin = {{"path", typed.trace}, {"train", typed.train}, {"hash", cell.at("trace")}};
  return out;
}

LoadedCodec start_program(const std::string& command, const CommonOptions& common, const ModelFacts& model) {
  LoadedCodec out;
  out.cache = canonical_cache_config(Json::object());
  apply_cache_overrides(out.cache, common.overrides, "a codec in another program takes only cache.* overrides");
  out.exec = std::make_shared<const ExecCodec>(
      model.cache_shape(), CachePolicy::from_json(out.cache),
      ExecOptions{.command = command, .seconds = common.exec_seconds, .stop = [] { return interrupted(); }});
  out.codecs = out.exec->codecs();
  out.label = kExec + out.exec->name();
  return out;
}

}  // namespace

std::unique_ptr<ModelRuntime> open_model(const CommonOptions& common) {
  if (common.device.on_cpu())
    make_attention_backend(common.attention);  // a wrong name is told before the model is read
  return common.device.open(common.model);
}

void require_device_form(const CommonOptions& common, const std::string& label, std::shared_ptr<const CodecSet> codecs,
                         const CachePolicy& policy, const std::string& hint) {
  if (common.device.on_cpu()) return;
  try {
    Sequence(std::move(codecs), policy, common.attention);
  } catch (const Error& e) { throw Error(e.kind(), fmt::format("{}: {}{}", label, e.what(), hint)); }
}

LoadedCodec load_codec(const std::string& spec, const CommonOptions& common, const ModelFacts& model) {
  if (spec == "exact")
    return {"exact", exact_codec_set(model.cache_shape()), CachePolicy::exact(), {{"rule", "none"}}, nullptr};
  LoadedCodec out;
  if (ends_with(spec, ".h5") && !spec.starts_with(kExec))
    out = load_archive(spec, common, model);
  else if ((ends_with(spec, ".yaml") || ends_with(spec, ".yml")) && !spec.starts_with(kExec))
    out = train_cell_file(spec, common, model);
  else if (spec.starts_with(kExec))
    out = start_program(spec.substr(kExec.size()), common, model);
  else
    fail_usage(fmt::format("--codec '{}' is neither exact nor a FILE.codec.h5 nor a cell.yaml nor exec:COMMAND", spec));
  if (!out.codecs) return out;
  out.policy = CachePolicy::from_json(out.cache);
  if (const std::string reason = cache_conflict(out.policy, *out.codecs); !reason.empty())
    fail_usage(fmt::format("{}: {}", spec, reason));
  require_backend(common.attention, out);
  return out;
}

std::vector<LoadedCodec> load_codecs(const CommonOptions& common, const ModelFacts& model) {
  std::vector<LoadedCodec> out;
  refuse_idle_overrides(common);
  for (const auto& spec : common.codecs) {
    out.push_back(load_codec(spec, common, model));
    if (!out.back().codecs) return {};
  }
  std::map<std::string, int> seen;
  for (LoadedCodec& codec : out) codec.label = own_label(seen, codec.label);
  return out;
}

void refuse_idle_overrides(const CommonOptions& common) {
  if (!common.overrides.empty() && std::ranges::all_of(common.codecs, [](const auto& spec) { return spec == "exact"; }))
    fail_usage(
        fmt::format("'{}': the exact cache takes no overrides; for exact tokens under a window or a policy name a "
                    "cell.yaml with codec: {{name: exact}}",
                    common.overrides.front()));
}

std::string own_label(std::map<std::string, int>& seen, const std::string& label) {
  const int n = ++seen[label];
  return n > 1 ? fmt::format("{} #{}", label, n) : label;
}

std::string file_label(const std::filesystem::path& path, const std::string& label) {
  return label == "exact" ? path.filename().string() : label;
}

void check_cell_file(const CellConfig& cell, const std::string& path, const CommonOptions& common) {
  std::vector<std::string> of_cache;
  std::ranges::copy_if(common.overrides, std::back_inserter(of_cache),
                       [](const std::string& o) { return o.starts_with("cache."); });
  require_reached(cell.cache, of_cache);
  if (!cell.layers.empty() || !cell.heads.empty())
    fail_usage(fmt::format("{}: trains some layers or heads only; a replay codes all of them", path));
}

void refuse_exec(const CommonOptions& common, const std::string& reason) {
  for (const auto& spec : common.codecs)
    if (spec.starts_with(kExec)) fail_usage(fmt::format("--codec {}: {}", spec, reason));
}

void warn_of_exact_rows(std::span<const LoadedCodec> codecs) {
  const DType of_exact = codecs[0].policy.exact_dtype;
  for (const LoadedCodec& codec : codecs)
    if (codec.policy.exact_dtype != of_exact)
      log_warning(fmt::format("{} keeps its exact rows as {}, the exact cache as {}", codec.label,
                              dtype_name(codec.policy.exact_dtype), dtype_name(of_exact)));
}

void require_cache_memory(std::span<const HeldCaches> caches, int64_t tokens) {
  int64_t all = 0, most = -1;
  const HeldCaches* largest = nullptr;
  for (const HeldCaches& c : caches) {
    CachePolicy policy = c.policy;
    policy.keep = nullptr;
    const int64_t bytes = c.sequences * ledger_at(c.codecs, policy, tokens).total_sequence() + c.beside;
    all += bytes;
    if (bytes > most) largest = &c;
    most = std::max(most, bytes);
  }
  if (!largest) return;
  const std::string of_all =
      caches.size() == 1 ? "" : fmt::format(", the largest of {} caches held at once", caches.size());
  const std::string sequences = largest->sequences == 1 ? "" : fmt::format("{} sequences of ", largest->sequences);
  require_memory(
      fmt::format("{} ({}), {}{} tokens{}", largest->label, protocol_text(largest->policy), sequences, tokens, of_all),
      all);
}

std::vector<ReplayText> read_texts(const TextSources& text, const ModelRuntime& model) {
  const Tokenizer* tokenizer = tokenizer_for(text, [&]() -> const Tokenizer& { return model.tokenizer(); });
  std::vector<ReplayText> out;
  for (auto& d : read_documents(text, tokenizer, model.facts().vocab))
    out.push_back({std::move(d.name), std::move(d.tokens)});
  return out;
}

void add_bits(Json& row, const ByteLedger& ledger, const CacheShape& shape, int64_t tokens, const Json& codec_config,
              const std::optional<int64_t>& claimed) {
  if (claimed) {
    ByteLedger with_claim;
    with_claim.codes = *claimed;
    with_claim.sinks = ledger.sinks;
    with_claim.window = ledger.window;
    row["bits_per_value"] =
        fmt::format("{:.3f} claimed by {}{}, not held", bits_per_value(with_claim, shape, tokens, 0), kExec,
                    codec_config.at("program").get<std::string>());
    row["claimed_bytes"] = *claimed;
    return;
  }
  for (const auto& [key, sequences] :
       {std::pair{"bits_per_value", 0}, std::pair{"bits_per_value_1", 1}, std::pair{"bits_per_value_64", 64}})
    row[key] = bits_per_value(ledger, shape, tokens, sequences);
}

std::vector<Column> bits_columns() {
  return {{"bits_per_value", "bits/value", "{:.3f}"},
          {"bits_per_value_1", "with books, 1 seq", "{:.3f}"},
          {"bits_per_value_64", "64 seq", "{:.3f}"}};
}

int run_ls(const std::string& what, TableFormat format) {
  Table modes{{{"mode", "mode", "", false}, {"meaning", "meaning", "", false}}, {}};
  for (const ReplayModeInfo& m : replay_modes()) modes.rows.push_back({{"mode", m.name}, {"meaning", m.meaning}});
  print(what == "backends"     ? backends_table()
        : what == "rules"      ? rules_table()
        : what == "policies"   ? policies_table()
        : what == "strategies" ? strategies_table()
        : what == "shapes"     ? shapes_table()
                               : modes,
        format);
  return kExitOk;
}

}  // namespace vqkv::eval
