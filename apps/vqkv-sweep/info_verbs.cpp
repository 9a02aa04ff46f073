#include <fmt/format.h>

#include <algorithm>
#include <cstdio>

#include "cache/policies/kinds.h"
#include "codec/transform/transform.h"
#include "common/cache_tables.h"
#include "common/tool.h"
#include "config/config.h"
#include "core/error.h"
#include "core/names.h"
#include "experiment/explain.h"
#include "generation/strategies/strategy.h"
#include "metric/metric.h"
#include "verbs.h"

namespace vqkv::sweep {
namespace {

std::string join_list(const std::vector<std::string>& v) { return fmt::format("{}", fmt::join(v, ", ")); }

Table knob_table(const std::vector<Knob>& knobs) {
  Table t;
  t.columns = {{"knob", "", "", false},
               {"default", "", "", false},
               {"range", "", "", false},
               {"type", "", "", false},
               {"help", "", "", false}};
  for (const Knob& k : knobs)
    t.rows.push_back({{"knob", k.name},
                      {"default", k.get()},
                      {"range", k.range},
                      {"type", k.type},
                      {"help", k.help + (k.effort ? "; training effort" : "")}});
  return t;
}

// JSON for tools, text for people.
void print_facts(const std::vector<std::pair<std::string, Json>>& facts, const std::vector<Knob>& knobs,
                 const Common& common) {
  const Table table = knob_table(knobs);
  if (common.format == TableFormat::kJson || common.format == TableFormat::kJsonl) {
    Json out = Json::object();
    for (const auto& [key, value] : facts) out[key] = value;
    if (!knobs.empty()) out["knobs"] = table.rows;
    std::puts(out.dump(common.format == TableFormat::kJson ? 2 : -1).c_str());
    return;
  }
  if (common.format == TableFormat::kCsv) {
    print(table, common.format);
    return;
  }
  for (const auto& [key, value] : facts) {
    if (value.is_null() || value == "" || value.empty()) continue;
    if (value.is_object()) {
      std::printf("%s:\n", key.c_str());
      for (const auto& [k, v] : value.items()) std::printf("  %-12s %s\n", k.c_str(), v.dump().c_str());
    } else {
      std::printf("%-9s %s\n", (key + ":").c_str(),
                  (value.is_string() ? value.get<std::string>() : value.dump()).c_str());
    }
  }
  if (!knobs.empty()) {
    std::printf("\n");
    print(table, TableFormat::kMarkdown);
  }
}

}  // namespace

int run_ls(const std::string& what, const Common& common) {
  Table t;
  const auto left = [&](std::initializer_list<const char*> names) {
    for (const char* n : names) t.columns.push_back({n, "", "", false});
  };
  if (what == "codecs") {
    // Five columns fit a terminal; the other formats hold everything, and `explain` tells the rest.
    if (common.format == TableFormat::kMarkdown)
      left({"name", "title", "family", "bits", "rope"});
    else
      left({"name", "title", "family", "bits", "rope", "paper", "caveat", "assumed"});
    for (const Method* m : all_methods()) {
      const MethodInfo i = m->describe();
      t.rows.push_back({{"name", i.name},
                        {"title", i.title},
                        {"family", i.family},
                        {"bits", i.bits},
                        {"rope", join_list(i.rope)},
                        {"paper", i.paper},
                        {"caveat", i.caveat},
                        {"assumed", i.assumed}});
    }
  } else if (what == "transforms") {
    if (common.format == TableFormat::kMarkdown)
      left({"name", "title", "side_bits", "width"});
    else
      left({"name", "title", "side_bits", "width", "paper", "caveat", "assumed"});
    for (const TransformKind* k : all_transforms()) {
      const TransformInfo i = k->describe();
      t.rows.push_back({{"name", i.name},
                        {"title", i.title},
                        {"side_bits", i.side_bits},
                        {"width", i.width},
                        {"paper", i.paper},
                        {"caveat", i.caveat},
                        {"assumed", i.assumed}});
    }
  } else if (what == "rules") {
    t = rules_table();
  } else if (what == "policies") {
    t = policies_table();
  } else if (what == "strategies") {
    t = strategies_table();
  } else if (what == "metrics") {
    if (common.format == TableFormat::kMarkdown)
      left({"name", "title", "unit", "better"});
    else
      left({"name", "title", "unit", "better", "formula", "source", "caveat"});
    for (const MetricKind* k : all_metrics()) {
      const MetricInfo i = k->describe();
      const char* better = i.better == Better::kLower ? "lower" : i.better == Better::kHigher ? "higher" : "neither";
      t.rows.push_back({{"name", i.name},
                        {"title", i.title},
                        {"unit", i.unit},
                        {"better", better},
                        {"formula", i.formula},
                        {"source", i.source},
                        {"caveat", i.caveat}});
    }
  } else if (what == "backends") {
    t = backends_table();
  } else {
    fail_unknown("ls:", what, {"codecs", "transforms", "rules", "policies", "strategies", "metrics", "backends"});
  }
  print(t, common.format);
  return kExitOk;
}

namespace {

int explain_file(const std::string& file, const std::vector<std::string>& overrides, const Common& common) {
  Config config = load_config(file);
  for (const auto& o : overrides) apply_override(config, o);
  const Json told = explain_configuration(config);
  Table t{{{"tier", ""},
           {"tokens", "coded tokens"},
           {"role", "", "", false},
           {"codec", "", "", false},
           {"bits_per_value", "bits/value", "{:.3f}"},
           {"knobs", "", "", false}},
          {}};
  for (Json row : told.at("tiers")) {
    std::string knobs;
    for (const auto& [key, value] : row.at("knobs").items())
      knobs += fmt::format("{}{} {}", knobs.empty() ? "" : ", ", key,
                           value.is_string() ? value.get<std::string>() : value.dump());
    row["knobs"] = knobs;
    t.rows.push_back(std::move(row));
  }
  if (common.format == TableFormat::kMarkdown) std::printf("%s\n\n", told.at("protocol").get<std::string>().c_str());
  if (print(t, common.format, told) && t.rows.at(0).at("bits_per_value").is_null())
    std::printf("\nBits depend on the model's shape: name a trace of it (trace.path=FILE.trace.h5).\n");
  return kExitOk;
}

}  // namespace

int run_explain(const std::string& full_name, const std::vector<std::string>& overrides, const Common& common) {
  if (full_name.ends_with(".yaml") || full_name.ends_with(".yml")) return explain_file(full_name, overrides, common);
  if (!overrides.empty())
    fail_usage(fmt::format("explain: '{}': only a configuration, FILE.yaml, takes overrides", overrides[0]));
  // A codec and a strategy may have one name: KIND.NAME tells them apart, and the name alone is the codec's.
  std::string name = full_name, only;
  std::vector<std::string> known;
  for (const std::string kind : {"codec", "transform", "metric", "rule", "policy", "strategy"})
    if (name.starts_with(kind + ".")) {
      only = kind;
      name = name.substr(kind.size() + 1);
    }
  const auto is = [&](const char* kind, const std::string& candidate) {
    if (!only.empty() && only != kind) return false;
    known.push_back(candidate);
    return candidate == name;
  };
  for (const Method* m : all_methods()) {
    const MethodInfo i = m->describe();
    if (!is("codec", i.name)) continue;
    const bool twice = std::ranges::any_of(all_strategies(), [&](auto* k) { return k->describe().name == i.name; });
    print_facts({{"codec", i.name},
                 {"title", i.title},
                 {"family", i.family},
                 {"bits", i.bits},
                 {"rope", join_list(i.rope)},
                 {"learns from", join_list(m->needs(Json::object()).names())},
                 {"paper", i.paper},
                 {"bibtex", i.bibtex},
                 {"caveat", i.caveat},
                 {"assumed", i.assumed},
                 {"version", i.version},
                 {"presets", i.presets},
                 {"see also", twice ? Json("strategy." + i.name) : Json()}},
                m->knobs(), common);
    return kExitOk;
  }
  for (const TransformKind* k : all_transforms()) {
    const TransformInfo i = k->describe();
    if (!is("transform", i.name)) continue;
    print_facts({{"transform", i.name},
                 {"title", i.title},
                 {"side_bits", i.side_bits},
                 {"width", i.width},
                 {"learns from", join_list(k->needs(Json::object()).names())},
                 {"paper", i.paper},
                 {"caveat", i.caveat},
                 {"assumed", i.assumed},
                 {"suits", i.suits},
                 {"version", i.version}},
                k->knobs(), common);
    return kExitOk;
  }
  for (const MetricKind* k : all_metrics()) {
    const MetricInfo i = k->describe();
    if (!is("metric", i.name)) continue;
    print_facts({{"metric", i.name},
                 {"title", i.title},
                 {"unit", i.unit},
                 {"formula", i.formula},
                 {"source", i.source},
                 {"caveat", i.caveat},
                 {"version", i.version}},
                {}, common);
    return kExitOk;
  }
  for (const RuleInfo& p : cache_rules()) {
    if (!is("rule", p.name)) continue;
    print_facts({{"rule", p.name}, {"title", p.title}, {"knobs", p.knobs}, {"source", p.source}}, {}, common);
    return kExitOk;
  }
  for (const PolicyKind* k : all_policies()) {
    const PolicyInfo i = k->describe();
    if (!is("policy", i.name)) continue;
    print_facts({{"policy", i.name},
                 {"title", i.title},
                 {"bits", i.bits},
                 {"paper", i.paper},
                 {"caveat", i.caveat},
                 {"assumed", i.assumed},
                 {"version", i.version}},
                k->knobs(), common);
    return kExitOk;
  }
  for (const StrategyKind* k : all_strategies()) {
    const StrategyInfo i = k->describe();
    if (!is("strategy", i.name)) continue;
    print_facts({{"strategy", i.name},
                 {"title", i.title},
                 {"target", i.target},
                 {"bits", i.bits},
                 {"paper", i.paper},
                 {"bibtex", i.bibtex},
                 {"caveat", i.caveat},
                 {"assumed", i.assumed},
                 {"version", i.version}},
                k->knobs(), common);
    return kExitOk;
  }
  fail_unknown("explain: codec, transform, metric, rule, policy or strategy", full_name, known);
}

}  // namespace vqkv::sweep
