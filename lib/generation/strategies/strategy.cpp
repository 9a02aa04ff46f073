#include "generation/strategies/strategy.h"

#include <fmt/format.h>

#include "cache/keep_rule.h"
#include "core/error.h"
#include "core/names.h"

namespace vqkv {

#define VQKV_STRATEGY(name) const StrategyKind& vqkv_strategy_##name();
#include "generation/strategies/strategies.inc"
#undef VQKV_STRATEGY

const std::vector<const StrategyKind*>& all_strategies() {
  static const std::vector<const StrategyKind*> kinds = {
#define VQKV_STRATEGY(name) &vqkv_strategy_##name(),
#include "generation/strategies/strategies.inc"
#undef VQKV_STRATEGY
  };
  return kinds;
}

const StrategyKind& find_strategy(const std::string& name, const std::string& path) {
  std::vector<std::string> names;
  for (const StrategyKind* k : all_strategies()) {
    names.push_back(k->describe().name);
    if (names.back() == name) return *k;
  }
  fail_unknown(path.empty() ? "strategy" : path + ": strategy", name, names);
}

void require_rollback(const std::string& strategy, const CachePolicy& policy) {
  const auto refuse = [&](const std::string& reason) {
    fail_usage(fmt::format("strategy {} takes tokens back and reads codes: {}", strategy, reason));
  };
  if (!policy.keeps_codes()) refuse("this cache keeps none");
  if (policy.keep)
    refuse(fmt::format("{} decides by what tokens received; take a policy that sums nothing", policy.keep->text()));
  if (policy.prompt > 0) refuse("cache.prompt holds back what it codes for a prompt of its own length; drop it");
  for (const Role role : {Role::kKey, Role::kValue})
    if (policy.rule(role).window < 1)
      refuse(fmt::format("cache.{} needs a window of 1 token or more, as no coded token can be taken back",
                         role_name(role)));
}

void PassBytes::add(int64_t weight_bytes, const CacheReads& cache) {
  ++passes;
  weights += weight_bytes;
  codes += cache.codes;
  exact += cache.exact;
}

Json PassBytes::to_json() const {
  return {{"passes", passes}, {"weights", weights}, {"codes", codes}, {"exact", exact}};
}

Json StrategyCounts::to_json() const {
  return {{"target", target.to_json()},
          {"draft", draft.to_json()},
          {"drafted", drafted},
          {"accepted", accepted},
          {"moved", moved},
          {"fetched", fetched},
          {"far", far}};
}

}  // namespace vqkv
