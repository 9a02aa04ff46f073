#include "experiment/explain.h"

#include <fmt/format.h>

#include <optional>

#include "core/error.h"
#include "experiment/plan.h"
#include "experiment/protocol.h"
#include "experiment/trace_facts.h"
#include "experiment/trace_rows.h"

namespace vqkv {
namespace {

double bits_per_value(const CodecPlan& plan, size_t tier, Role role) {
  double bits = 0;
  int64_t channels = 0;
  for (const UnitSpec& spec : plan.units) {
    if (spec.tier != static_cast<int>(tier) || spec.unit.role != role) continue;
    const auto codec = make_codec(spec);
    bits += (spec.level > 0 ? codec->level_layout(spec.level - 1) : codec->layout()).bits_per_token();
    channels += spec.unit.channels();
  }
  return bits / static_cast<double>(channels);
}

}  // namespace

Json explain_configuration(const Config& config) {
  Config grouped = config;
  const CellConfig cell = read_single_cell(grouped);
  std::optional<CodecPlan> plan;
  if (!cell.trace.empty()) {
    const TraceFacts facts = read_trace_facts(cell.trace);
    check_against_trace(grouped, cell, facts);
    plan = plan_in_scope(resolve_single_cell(grouped, cell, facts.shape), scope_of(cell, facts.shape));
    if (!plan->skip.empty()) fail_usage(grouped.annotate(plan->skip));
  }
  const Json tiers = cell.codec.contains("tiers") ? cell.codec["tiers"] : Json::array({cell.codec});
  Json rows = Json::array();
  std::string names[2];
  for (size_t i = 0; i < tiers.size(); ++i)
    for (const Role role : {Role::kKey, Role::kValue}) {
      Json knobs = tiers[i].at(role_name(role));
      std::string& name = names[static_cast<int>(role)];
      const Json level = knobs.value("level", Json());
      name = knobs.value("name", name);
      for (const char* key : {"name", "level"}) knobs.erase(key);
      rows.push_back({{"tier", i},
                      {"tokens", tiers[i].value("tokens", Json("all"))},
                      {"role", role_name(role)},
                      {"codec", level.is_null() ? name : level_text(name, level.get<int>())},
                      {"bits_per_value", plan ? Json(bits_per_value(*plan, i, role)) : Json()},
                      {"knobs", knobs}});
    }
  return {{"protocol", protocol_text(cell.policy(), cell.codec)}, {"tiers", rows}};
}

}  // namespace vqkv
