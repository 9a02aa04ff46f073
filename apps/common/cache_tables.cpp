#include "common/cache_tables.h"

#include <fmt/format.h>

#include <vector>

#include "attention/attention.h"
#include "cache/policies/kinds.h"
#include "experiment/shapes.h"
#include "generation/strategies/strategy.h"

namespace vqkv {
namespace {

constexpr RuleInfo kRules[] = {
    {"window", "the newest `window` tokens stay exact; older ones are coded in pages of `flush`",
     "sinks: first tokens kept exact (4); window (128); flush (64); exact_dtype: f16 | bf16 | f32", "common practice"},
    {"kivi", "keys are coded in whole groups of `residual` tokens, values one by one behind the newest `residual`",
     "residual (128); sinks; exact_dtype", "KIVI, ICML 2024, arXiv 2402.02750"},
    {"residual",
     "all of `prompt` is coded when its last token is there, then every `residual` tokens together, keys as values",
     "residual (128); prompt (0); sinks; exact_dtype", "transformers, QuantizedCache"},
    {"none", "nothing is coded: the exact cache", "exact_dtype", "baseline"},
};

Table left_table(std::initializer_list<const char*> names) {
  Table t;
  for (const char* n : names) t.columns.push_back({n, "", "", false});
  return t;
}

template <class Kind>
Table kinds_table(const std::vector<const Kind*>& kinds) {
  Table t = left_table({"name", "title", "knobs", "bits", "source"});
  for (const Kind* k : kinds) {
    const auto i = k->describe();
    std::vector<std::string> knobs;
    for (const Knob& knob : k->knobs()) knobs.push_back(fmt::format("{} ({})", knob.name, knob.get().dump()));
    t.rows.push_back({{"name", i.name},
                      {"title", i.title},
                      {"knobs", fmt::format("{}", fmt::join(knobs, "; "))},
                      {"bits", i.bits},
                      {"source", i.paper.empty() ? "common practice" : i.paper},
                      {"caveat", i.caveat},
                      {"assumed", i.assumed}});
  }
  return t;
}

}  // namespace

std::span<const RuleInfo> cache_rules() { return kRules; }

Table rules_table() {
  Table t = left_table({"name", "title", "knobs", "source"});
  for (const RuleInfo& r : kRules)
    t.rows.push_back({{"name", r.name}, {"title", r.title}, {"knobs", r.knobs}, {"source", r.source}});
  return t;
}

Table policies_table() { return kinds_table(all_policies()); }
Table strategies_table() { return kinds_table(all_strategies()); }

Table shapes_table() {
  Table t = left_table({"name"});
  for (const char* key : {"layers", "q_heads", "kv_heads", "head_dim"}) t.columns.push_back({key, key, "{:.0f}"});
  t.columns.push_back({"source", "source", "", false});
  for (const NamedShape& s : named_shapes())
    t.rows.push_back({{"name", s.name},
                      {"layers", s.layers},
                      {"q_heads", s.q_heads},
                      {"kv_heads", s.kv_heads},
                      {"head_dim", s.head_dim},
                      {"source", s.source}});
  return t;
}

Table backends_table() {
  Table t = left_table({"name"});
  for (const auto& n : attention_backend_names()) t.rows.push_back({{"name", n}});
  return t;
}

}  // namespace vqkv
