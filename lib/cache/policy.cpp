#include "cache/policy.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <limits>
#include <string>
#include <vector>

#include "cache/coding.h"
#include "cache/keep_rule.h"
#include "cache/policies/kinds.h"
#include "codec/codec_set.h"
#include "config/config.h"
#include "core/error.h"
#include "core/json.h"

namespace vqkv {
namespace {

constexpr int64_t kMaxTokens = int64_t{1} << 24;  // beyond any context; keeps token arithmetic far from overflow
constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

// One role's rule with all defaults; `base` is what it inherits from.
Json canonical_rule(const Json& given, const std::string& path, const Json& base) {
  ConfigReader(given, path);  // a map
  Json merged = base;
  for (const auto& [key, value] : given.items())
    if (!value.is_null() || !base.contains(key)) merged[key] = value;
  ConfigReader reader(merged, path);
  const std::string rule = reader.choice("rule", "window", {"window", "kivi", "residual", "none"});
  const int64_t window = reader.integer("window", 128, 0, kMaxTokens),
                flush = reader.integer("flush", 64, 1, kMaxTokens),
                residual = reader.integer("residual", 128, 1, kMaxTokens);
  reader.finish();
  Json out = {{"rule", rule}};
  if (rule == "window") {
    out["window"] = window;
    out["flush"] = flush;
  } else if (rule != "none") {
    out["residual"] = residual;
  }
  return out;
}

FlushRule rule_of(const Json& canonical, Role role, int64_t prompt) {
  if (canonical.at("rule") == "window")
    return {canonical.at("window").get<int64_t>(), canonical.at("flush").get<int64_t>()};
  const int64_t r = canonical.value("residual", int64_t{128});
  if (canonical.at("rule") == "residual") return {1, r, prompt};
  return role == Role::kKey ? FlushRule{1, r} : FlushRule{r + 1, 1};
}

// `coded: image` says by itself which tokens are exact: those of text.
Json canonical_of_images(const Json& config, const std::string& exact_dtype) {
  const Json rule = {{"rule", "window"}, {"window", 0}, {"flush", 1}};
  const Json out = {{"sinks", 0}, {"exact_dtype", exact_dtype}, {"k", rule}, {"v", rule}, {"coded", "image"}};
  for (const auto& [key, value] : config.items())
    if (!value.is_null() && key != "exact_dtype" && value != out.value(key, key == "policy" ? Json("all") : Json()))
      fail_usage(fmt::format("cache.{}: cache.coded: image says by itself which tokens are exact", key));
  return out;
}

}  // namespace

Json canonical_cache_config(const Json& config) {
  ConfigReader given(config, "cache");
  Json out = {{"sinks", given.integer("sinks", 4, 0, kMaxTokens)},
              {"exact_dtype", given.choice("exact_dtype", "f16", {"f16", "bf16", "f32"})}};
  Json base = Json::object();
  for (const char* key : {"window", "flush", "rule", "residual"})
    if (const Json& value = given.raw(key); !value.is_null()) base[key] = value;
  canonical_rule(Json::object(), "cache", base);  // a bad shared value is named where it was written
  for (const char* role : {"k", "v"}) {
    const Json& own = given.raw(role);
    out[role] = canonical_rule(own.is_null() ? Json::object() : own, std::string("cache.") + role, base);
  }
  const int64_t prompt = given.integer("prompt", 0, 0, kMaxTokens);
  const std::string generated = given.choice("generated", "coded", {"coded", "exact"});
  const Json policy = without_nulls(given.raw("policy"));
  const std::string coded = given.choice("coded", "all", {"all", "image"});
  given.finish();
  if (coded == "image") return canonical_of_images(config, out["exact_dtype"].get<std::string>());
  const bool exact_k = out["k"]["rule"] == "none", exact_v = out["v"]["rule"] == "none";
  if (exact_k != exact_v)
    fail_usage(
        fmt::format("cache.{}.rule: none holds for both roles or for neither, and cache.{}.rule is {}; to keep one "
                    "role exact give it the codec 'exact'",
                    exact_k ? "k" : "v", exact_k ? "v" : "k", out[exact_k ? "v" : "k"]["rule"].get<std::string>()));
  if (prompt == 0 && generated == "exact")
    fail_usage("cache.generated: exact needs cache.prompt, the tokens behind which nothing is coded");
  if (prompt > 0 && exact_k) fail_usage("cache.prompt: rule none codes nothing, neither a prompt nor what follows");
  if (prompt > 0) out.update({{"prompt", prompt}, {"generated", generated}});
  if (!policy.is_null()) {
    Json knobs = policy.is_object() ? policy : Json::object();
    const Json name = policy.is_object() ? policy.value("name", Json()) : policy;
    if (!name.is_string()) fail_expected("cache.policy", "a name, or a map with `name`", policy);
    knobs.erase("name");
    const PolicyKind& kind =
        find_policy(name.get<std::string>(), policy.is_object() ? "cache.policy.name" : "cache.policy");
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
  p.prompt = p.waits = c.value("prompt", int64_t{0});
  if (p.codes) {
    p.k = rule_of(c.at("k"), Role::kKey, p.prompt);
    p.v = rule_of(c.at("v"), Role::kValue, p.prompt);
  }
  p.codes_generated = c.value("generated", "coded") == "coded";
  if (c.contains("coded")) {
    p.codes_images = true;
    p.codes_generated = false;
    p.waits = kNever;
  }
  if (const auto policy = c.find("policy"); policy != c.end())
    find_policy(policy->at("name").get<std::string>()).apply(*policy, p);
  return p;
}

CachePolicy CachePolicy::of_text(const TokenRun& images) const {
  CachePolicy p = *this;
  if (!codes_images || images.tokens() == 0) return p;
  p.sinks = p.fitted_from = images.begin;
  p.prompt = p.waits = images.end;
  return p;
}

CachePolicy CachePolicy::for_codecs(const CodecSet& codecs) const {
  CachePolicy p = *this;
  if (!p.keeps_codes()) return p;
  if (!codes_images)
    p.waits = std::max(p.prompt, codecs.fit_minimum());
  else if (prompt - fitted_from < codecs.fit_minimum())  // no more image tokens will come
    p.waits = kNever;
  return p;
}

std::string CachePolicy::waits_text() const {
  if (codes_images) return "under cache.coded: image text is exact";
  return fmt::format(fmt::runtime(waits > prompt ? "a codec fits its parameters to {} tokens of a prompt at least"
                                                 : "nothing is coded before the {} tokens of cache.prompt are there"),
                     waits);
}

namespace {

std::string tiers_conflict(const CachePolicy& policy, const std::vector<int64_t>& tier_tokens) {
  if (tier_tokens.empty()) return "";
  if (policy.codes_images)
    return "cache.coded: image codes an image's tokens together, and the tiers of a codec hold tokens by their age";
  if (policy.k.first > 0 || policy.v.first > 0)
    return "cache.rule: residual codes all of cache.prompt together, and the tiers of a codec hold tokens by their age";
  if (policy.keep)
    return fmt::format(
        "cache.policy {}: it gives up tokens head by head, and the tiers of a codec hold all tokens of an age",
        policy.keep->text());
  for (size_t i = 0; i < tier_tokens.size(); ++i)
    for (const Role role : {Role::kKey, Role::kValue})
      if (tier_tokens[i] % policy.rule(role).flush != 0)
        return fmt::format("codec.tiers[{}].tokens: {} is not a multiple of {}, the flush of cache.{}", i,
                           tier_tokens[i], policy.rule(role).flush, role_name(role));
  return "";
}

std::string unit_conflict(const CachePolicy& policy, const UnitSpec& spec, const Codec& codec) {
  const Role role = spec.unit.role;
  const int64_t block = codec.layout().block_tokens;
  const FlushRule& rule = policy.rule(role);
  if ((rule.first == 0 || policy.codes_generated) && rule.flush % block != 0)
    return fmt::format("cache.{}: flush {} is not a multiple of the {} tokens that codec '{}' codes together",
                       role_name(role), rule.flush, block, spec.method);
  if (const int64_t lot = rule.first - policy.sinks; lot > 0 && lot % block != 0)
    return fmt::format(
        "cache.prompt: {} tokens behind the sinks are not a multiple of the {} that codec '{}' codes "
        "together",
        lot, block, spec.method);
  if (std::string reason = prompt_conflict(policy, spec.method, codec); !reason.empty()) return reason;
  if (policy.keep && codec.sees_lower() && spec.unit.layer > 0)
    return fmt::format(
        "cache.policy {}: codec '{}' sees the rows of the layer below, and this policy gives up tokens layer by layer",
        policy.keep->text(), spec.method);
  return "";
}

}  // namespace

std::string cache_conflict(const CachePolicy& policy, const CodecPlan& plan) {
  if (!policy.keeps_codes()) return "";
  std::string reason = tiers_conflict(policy, plan.tiers);
  const UnitSpec* last = nullptr;
  for (const UnitSpec& spec : plan.units) {
    if (!reason.empty()) break;
    // A level codes as many tokens together as its whole; most units repeat one before.
    if (spec.level > 0 || (last && last->same_codec(spec) && (last->unit.layer > 0) == (spec.unit.layer > 0))) continue;
    last = &spec;
    reason = unit_conflict(policy, spec, *make_codec(spec));
  }
  return reason;
}

std::string cache_conflict(const CachePolicy& policy, const CodecSet& codecs) {
  if (!policy.keeps_codes()) return "";
  std::string reason = tiers_conflict(policy, codecs.tier_tokens());
  for (const TrainedUnit& u : codecs.units())
    if (reason.empty()) reason = unit_conflict(policy, u.spec, *u.codec);
  return reason;
}

int64_t CachePolicy::first_beyond(const float* values, int64_t n) const {
  // The smallest magnitude that rounds to infinity, as bits: they are ordered as the numbers are, and the compiler
  // tests many at once.
  const uint32_t limit = exact_dtype == DType::kF16    ? std::bit_cast<uint32_t>(65520.0f)
                         : exact_dtype == DType::kBF16 ? 0x7f7f8000u
                                                       : 0x7f800000u;
  const auto beyond = [&](float v) { return (std::bit_cast<uint32_t>(v) & 0x7fffffffu) >= limit; };
  uint32_t bad = 0;
  for (int64_t i = 0; i < n; ++i) bad |= beyond(values[i]);
  return bad == 0 ? -1 : std::find_if(values, values + n, beyond) - values;
}

void CachePolicy::fail_beyond(const std::string& place, float value) const {
  fail_data(fmt::format("{}: {} leaves {}, the cache's exact_dtype; bf16 and f32 reach further (cache.exact_dtype)",
                        place, value, dtype_name(exact_dtype)));
}

CachePolicy CachePolicy::exact(DType dtype) {
  CachePolicy p;
  p.codes = false;
  p.exact_dtype = dtype;
  return p;
}

}  // namespace vqkv
