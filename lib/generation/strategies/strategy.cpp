#include "generation/strategies/strategy.h"

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
          {"moved", moved}};
}

}  // namespace vqkv
