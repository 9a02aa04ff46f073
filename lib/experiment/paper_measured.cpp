#include "experiment/paper_measured.h"

#include <fmt/format.h>

#include <algorithm>
#include <cctype>
#include <cmath>

#include "codec/codec_set.h"
#include "core/error.h"
#include "io/atomic_file.h"
#include "io/json_fields.h"

namespace vqkv {
namespace {

bool is_text(const Json& j) { return j.is_string(); }
bool is_map(const Json& j) { return j.is_object(); }

// "Llama-3-8B" and "llama 3 8b" are one name.
std::string plain_name(const std::string& name) {
  std::string out;
  for (const char c : name)
    if (std::isalnum(static_cast<unsigned char>(c)))
      out += static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return out;
}

std::string listed(const std::vector<std::string>& names) {
  if (names.empty()) return "no text";
  return names.size() == 1 ? names[0] : fmt::format("{} and {} more", names[0], names.size() - 1);
}

FlushRule rule_field(const Json& cache, const char* role, const std::string& where) {
  const Json& rule = map_field(cache, role, where);
  return {integer_field(rule, "window", 0, INT64_MAX, where), integer_field(rule, "flush", 1, INT64_MAX, where)};
}

void read_replay_rows(const Json& facts, const Json& rows, const MeasuredNumber& common, const std::string& path,
                      std::vector<MeasuredNumber>& out) {
  MeasuredNumber shared = common;
  shared.quantity = "ppl";
  shared.context = integer_field(facts, "context", 1, INT64_MAX, path);
  int64_t whole = 0;  // windows of all the texts, at least
  for (const Json& d : list_field(facts, "documents", is_map, "a list of {name, tokens}", path)) {
    shared.texts.push_back(text_field(d, "name", path));
    whole += integer_field(d, "tokens", 0, INT64_MAX, path) / shared.context;
  }
  const int64_t windows = integer_field(facts, "windows", 0, INT64_MAX, path);
  if (windows < whole) shared.notes.push_back(fmt::format("the first {} windows", windows));
  bool exact = false;
  for (size_t i = 0; i < rows.size(); ++i) {
    const std::string where = fmt::format("{}: rows[{}]", path, i);
    const Json& row = rows[i];
    MeasuredNumber n = shared;
    n.mode = text_field(row, "mode", where);
    const double of_exact = number_field(row, "ppl.exact", where);
    n.value = number_field(row, "ppl", where);
    n.codec = text_field(row, "codec", where);
    if (!exact) {  // the same in every row
      MeasuredNumber e = shared;
      e.mode = n.mode;
      e.codec = "exact";
      e.exact_cache = true;
      e.value = of_exact;
      out.push_back(std::move(e));
      exact = true;
    }
    const Json& bytes = map_field(row, "bytes", where);
    // Neither self-noise nor a window alone is a codec's.
    if (integer_field(bytes, "codes", 0, INT64_MAX, where) + integer_field(bytes, "side", 0, INT64_MAX, where) == 0)
      continue;
    n.of_exact = of_exact;
    n.config = map_field(row, "config", where);
    const Json& cache = map_field(row, "cache", where);
    n.policy.sinks = integer_field(cache, "sinks", 0, INT64_MAX, where);
    n.policy.k = rule_field(cache, "k", where);
    n.policy.v = rule_field(cache, "v", where);
    for (const Json& flag : list_field(row, "flags", is_text, "a list of texts", where))
      n.notes.push_back(flag.get<std::string>());
    if (std::isfinite(n.value)) out.push_back(std::move(n));
  }
}

void read_strategy_rows(const Json& facts, const Json& rows, const MeasuredNumber& common, const std::string& path,
                        std::vector<MeasuredNumber>& out) {
  MeasuredNumber shared = common;
  shared.quantity = "acceptance";
  shared.tokens = integer_field(facts, "prompt_tokens", 1, INT64_MAX, path);
  shared.mode = boolean_field(facts, "exact_prefill", path) ? "prefill-exact" : "forced";
  const double temperature = number_field(map_field(facts, "sampling", path), "temperature", path);
  if (temperature != 0) shared.notes.push_back(fmt::format("temperature {}", temperature));
  for (size_t i = 0; i < rows.size(); ++i) {
    const std::string where = fmt::format("{}: rows[{}]", path, i);
    if (!rows[i].contains("acceptance")) continue;  // plain decoding drafts nothing
    MeasuredNumber n = shared;
    n.value = 100 * number_field(rows[i], "acceptance", where);
    n.codec = text_field(rows[i], "codec", where);
    n.strategy = text_field(rows[i], "strategy", where);
    n.config = map_field(rows[i], "config", where);
    try {
      n.policy = CachePolicy::from_json(map_field(rows[i], "cache", where));
    } catch (const Error& e) { fail_data(fmt::format("{}: {}", where, e.what())); }
    out.push_back(std::move(n));
  }
}

bool same_rule(const FlushRule& a, const FlushRule& b) { return a.window == b.window && a.flush == b.flush; }

// The codec section of a row, under the cache that goes with it, is what was measured.
bool same_settings(const Json& codec, const Json& cache, const MeasuredNumber& m) {
  if (canonical_codec_config(codec) != m.config) return false;
  const Json section = cache.is_null() ? preset_cache_config(codec) : cache;
  const CachePolicy p = CachePolicy::from_json(canonical_cache_config(section.is_null() ? Json::object() : section));
  // Fake-quant codes every token behind the sinks.
  return p.sinks == m.policy.sinks &&
         (m.mode == "fake-quant" || (same_rule(p.k, m.policy.k) && same_rule(p.v, m.policy.v)));
}

}  // namespace

Json MeasuredNumber::to_json() const {
  return {{"value", value},
          {"of_exact", of_exact ? Json(*of_exact) : Json()},
          {"codec", codec},
          {"model", model},
          {"mode", mode},
          {"texts", texts},
          {"context", context > 0 ? Json(context) : Json()},
          {"prompt_tokens", tokens > 0 ? Json(tokens) : Json()},
          {"strategy", strategy.empty() ? Json() : Json(strategy)},
          {"notes", notes},
          {"file", file},
          {"command", command}};
}

std::vector<MeasuredNumber> read_measured(const std::string& path) {
  const Json j = parse_json(read_file(path), path);
  const bool table = j.is_object() && j.contains("facts") && j.contains("rows") && j["rows"].is_array() &&
                     !j["rows"].empty() && std::ranges::all_of(j["rows"], is_map);
  const bool strategy = table && j["rows"][0].contains("strategy"), replay = table && j["rows"][0].contains("ppl");
  if (!strategy && !replay)
    fail_data(
        fmt::format("{}: neither `vqkv-eval replay` nor `strategy` wrote it with --json (bytes need no file: "
                    "tables computes them)",
                    path));
  const Json& facts = map_field(j, "facts", path);
  MeasuredNumber common;
  common.file = path;
  common.model = text_field(facts, "model", path);
  common.command = text_field(facts, "command", path);
  std::vector<MeasuredNumber> out;
  (replay ? read_replay_rows : read_strategy_rows)(facts, j["rows"], common, path, out);
  return out;
}

std::optional<std::vector<std::string>> unmet_conditions(const PaperNumber& row, const MeasuredNumber& m) {
  if (!is_measured(row) || row.quantity != m.quantity || row.strategy != m.strategy) return std::nullopt;
  std::vector<std::string> unmet;
  if (m.exact_cache) {
    if (canonical_codec_config(row.codec) != canonical_codec_config({{"name", "exact"}})) return std::nullopt;
  } else if (!same_settings(row.codec, row.cache, m)) {
    if (std::ranges::none_of(row.scaled, [&](const Json& codec) { return same_settings(codec, nullptr, m); }))
      return std::nullopt;
    unmet.push_back(m.codec + ", for smaller heads");
  }
  const auto named = [&](const std::string& name) { return plain_name(name) == plain_name(m.model); };
  if (std::ranges::none_of(row.models, named)) unmet.push_back(m.model);
  if (row.quantity == "ppl") {
    const auto of_data = [&](const std::string& text) {
      return std::ranges::any_of(row.texts, [&](const std::string& data) { return text.starts_with(data); });
    };
    if (!std::ranges::all_of(m.texts, of_data)) unmet.push_back(listed(m.texts));
    if (row.context != m.context) unmet.push_back(fmt::format("{} tokens a window", m.context));
  }
  if (row.tokens > 0 && std::abs(m.tokens - row.tokens) > row.tokens / 20)  // prompts are texts, cut by nobody
    unmet.push_back(fmt::format("a prompt of {} tokens", m.tokens));
  if (!row.mode.empty() && !m.exact_cache && row.mode != m.mode) unmet.push_back("mode " + m.mode);
  unmet.insert(unmet.end(), m.notes.begin(), m.notes.end());
  return unmet;
}

}  // namespace vqkv
