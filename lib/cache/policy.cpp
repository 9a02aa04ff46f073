#include "cache/policy.h"

#include <fmt/format.h>

#include <bit>
#include <optional>
#include <string>
#include <vector>

#include "cache/policies/kinds.h"
#include "core/error.h"
#include "core/json.h"
#include "core/whole_number.h"

namespace vqkv {
namespace {

constexpr int64_t kMaxTokens = int64_t{1} << 24;  // beyond any context; keeps token arithmetic far from overflow

void check_keys(const Json& object, const std::string& path, const std::vector<std::string>& allowed) {
  if (!object.is_object()) fail_usage(fmt::format("{}: expected a mapping, found {}", path, object.dump()));
  for (const auto& [key, value] : object.items()) {
    bool known = false;
    for (const auto& a : allowed) known = known || a == key;
    if (known) continue;
    const std::string near = nearest_name(key, allowed);
    fail_usage(fmt::format("{}.{}: unknown key{}; allowed: {}", path, key,
                           near.empty() ? "" : ", did you mean '" + near + "'", fmt::join(allowed, ", ")));
  }
}

int64_t integer(const Json& object, const std::string& path, const char* key, int64_t fallback, int64_t low) {
  const auto it = object.find(key);
  if (it == object.end()) return fallback;
  const std::optional<int64_t> value = whole_number(*it);
  if (!value || *value < low || *value > kMaxTokens)
    fail_usage(fmt::format("{}.{}: {} is not allowed; an integer from {} to {} tokens", path, key, it->dump(), low,
                           kMaxTokens));
  return *value;
}

std::string text(const Json& object, const std::string& path, const char* key, const std::string& fallback,
                 const std::vector<std::string>& allowed) {
  const auto it = object.find(key);
  if (it == object.end()) return fallback;
  const std::string value = it->is_string() ? it->get<std::string>() : it->dump();
  for (const auto& a : allowed)
    if (a == value && it->is_string()) return value;
  const std::string near = nearest_name(value, allowed);
  fail_usage(fmt::format("{}.{}: '{}' is not allowed{}; allowed: {}", path, key, value,
                         near.empty() ? "" : ", did you mean '" + near + "'", fmt::join(allowed, ", ")));
}

// One role's rule with all defaults; `base` is what it inherits from.
Json canonical_rule(const Json& given, const std::string& path, const Json& base) {
  Json merged = base;
  for (const auto& [key, value] : given.items()) merged[key] = value;
  const std::string rule = text(merged, path, "rule", "window", {"window", "kivi", "none"});
  Json out = {{"rule", rule}};
  if (rule == "window") {
    out["window"] = integer(merged, path, "window", 128, 0);
    out["flush"] = integer(merged, path, "flush", 64, 1);
  } else if (rule == "kivi") {
    out["residual"] = integer(merged, path, "residual", 128, 1);
  }
  return out;
}

FlushRule rule_of(const Json& canonical, Role role) {
  if (canonical.at("rule") == "window")
    return {canonical.at("window").get<int64_t>(), canonical.at("flush").get<int64_t>()};
  const int64_t r = canonical.value("residual", int64_t{128});
  return role == Role::kKey ? FlushRule{1, r} : FlushRule{r + 1, 1};
}

}  // namespace

Json canonical_cache_config(const Json& config) {
  const Json given = config.is_null() ? Json::object() : config;
  check_keys(given, "cache", {"sinks", "window", "flush", "rule", "residual", "exact_dtype", "k", "v", "policy"});
  Json base = Json::object();
  for (const char* key : {"window", "flush", "rule", "residual"})
    if (given.contains(key)) base[key] = given.at(key);
  const auto refined = [&](const char* role) {
    const Json own = given.contains(role) ? given.at(role) : Json::object();
    const std::string path = std::string("cache.") + role;
    check_keys(own, path, {"window", "flush", "rule", "residual"});
    return canonical_rule(own, path, base);
  };
  canonical_rule(Json::object(), "cache", base);  // a bad shared value is named where it was written
  Json out = {{"sinks", integer(given, "cache", "sinks", 4, 0)},
              {"exact_dtype", text(given, "cache", "exact_dtype", "f16", {"f16", "bf16", "f32"})},
              {"k", refined("k")},
              {"v", refined("v")}};
  if ((out["k"]["rule"] == "none") != (out["v"]["rule"] == "none"))
    fail_usage(
        "cache: rule none holds for both roles or for neither; to keep one role exact give it the codec 'exact'");
  if (given.contains("policy")) {
    const Json& policy = given["policy"];
    Json knobs = policy.is_object() ? policy : Json::object();
    const Json name = policy.is_object() ? policy.value("name", Json()) : policy;
    if (!name.is_string())
      fail_usage(fmt::format("cache.policy: {} is not allowed; a name, or a mapping with `name`", policy.dump()));
    knobs.erase("name");
    const PolicyKind& kind = find_policy(name.get<std::string>(), "cache");
    Json canonical = kind.canonical(knobs, "cache.policy");
    canonical["name"] = name;
    if (name != "all") out["policy"] = canonical;  // what is written out and what is the default are one identity
  }
  return out;
}

CachePolicy CachePolicy::from_json(const Json& config) {
  const Json c = canonical_cache_config(config);
  CachePolicy p;
  p.sinks = c.at("sinks").get<int64_t>();
  p.exact_dtype = dtype_from_name(c.at("exact_dtype").get<std::string>());
  p.codes = c.at("k").at("rule") != "none";
  if (p.codes) {
    p.k = rule_of(c.at("k"), Role::kKey);
    p.v = rule_of(c.at("v"), Role::kValue);
  }
  if (const auto policy = c.find("policy"); policy != c.end())
    find_policy(policy->at("name").get<std::string>()).apply(*policy, p);
  return p;
}

void CachePolicy::check_exact(const float* values, int64_t n) const {
  // The smallest magnitude that rounds to infinity, as bits: they are ordered as the numbers are, and the compiler
  // tests many at once.
  const uint32_t limit = exact_dtype == DType::kF16    ? std::bit_cast<uint32_t>(65520.0f)
                         : exact_dtype == DType::kBF16 ? 0x7f7f8000u
                                                       : 0x7f800000u;
  uint32_t bad = 0;
  for (int64_t i = 0; i < n; ++i) bad |= (std::bit_cast<uint32_t>(values[i]) & 0x7fffffffu) >= limit;
  if (bad != 0)
    fail_data(fmt::format("a value leaves {}, the cache's exact_dtype; bf16 and f32 reach further (cache.exact_dtype)",
                          dtype_name(exact_dtype)));
}

void CachePolicy::round_exact(float* values, int64_t n) const {
  check_exact(values, n);
  round_to(exact_dtype, values, n);
}

CachePolicy CachePolicy::exact(DType dtype) {
  CachePolicy p;
  p.codes = false;
  p.exact_dtype = dtype;
  return p;
}

}  // namespace vqkv
