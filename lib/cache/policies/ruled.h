// What policies that decide by what tokens received (cache/keep_rule.h) have in common.
#pragma once
#include <fmt/format.h>

#include <memory>

#include "cache/keep_rule.h"
#include "cache/policies/kinds.h"
#include "core/error.h"
#include "core/json.h"

namespace vqkv {

// Knobs: default-constructible, with table() and check(path), which refuses values that don't go together (kUsage).
// Rule: a KeepRule made from them.
template <class Knobs, class Rule>
class RuledKind : public PolicyKind {
 public:
  std::vector<Knob> knobs() const override { return default_knobs<Knobs>(); }
  Json canonical(const Json& given, const std::string& path) const override {
    return parse(given, path).table().values();
  }
  void apply(const Json& given, CachePolicy& policy) const override {
    if (!policy.codes)
      fail_usage(
          fmt::format("cache.policy: {} needs a window; rule 'none' holds every token in a form that is not given up "
                      "token by token (codec 'exact' behind a window keeps the others exact)",
                      describe().name));
    policy.keep = std::make_shared<const Rule>(parse(given, "cache.policy"));
  }

 private:
  static Knobs parse(const Json& given, const std::string& path) {
    Knobs knobs;
    Json own = given;
    own.erase("name");
    knobs.table().apply(own, path);
    knobs.check(path);
    return knobs;
  }
};

}  // namespace vqkv
