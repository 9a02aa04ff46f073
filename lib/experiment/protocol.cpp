#include "experiment/protocol.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <vector>

#include "cache/keep_rule.h"
#include "codec/codec_set.h"
#include "core/json.h"

namespace vqkv {
namespace {

std::string grouped_digits(int64_t n) {
  std::string out = std::to_string(n);
  for (auto at = static_cast<int64_t>(out.size()) - 3; at > 0; at -= 3) out.insert(static_cast<size_t>(at), ",");
  return out;
}

std::string rule_text(const FlushRule& rule) {
  if (rule.window == 0) return rule.flush > 1 ? fmt::format("no window, blocks of {}", rule.flush) : "no exact token";
  if (rule.window == 1) return rule.flush > 1 ? fmt::format("blocks of {}", rule.flush) : "no exact token but its own";
  return fmt::format("window {}{}", rule.window, rule.flush > 1 ? fmt::format(", blocks of {}", rule.flush) : "");
}

// Names alone of a list of transforms.
std::string in_short(const Json& value) {
  if (value.is_null() || (value.is_array() && value.empty())) return "none";
  if (value.is_string()) return value.get<std::string>();
  if (!value.is_array()) return value.dump();
  std::vector<std::string> names;
  for (const Json& entry : value)
    names.push_back(entry.is_object() && entry.contains("name") ? entry.at("name").get<std::string>() : entry.dump());
  return fmt::format("{}", fmt::join(names, " + "));
}

// One role's keys in a tier, with what overrides change of them.
Json keys_of(const Json& tier, const char* role) {
  Json keys = tier.at(role);
  for (Json entry : tier.value("overrides", Json::array())) {
    if (!entry.at("set").contains(role)) continue;
    entry["set"] = Json(entry.at("set").at(role));
    keys["overrides"].push_back(entry);
  }
  return keys;
}

// What tells a tier's codec from those of the same method in other tiers: " (bits 4)", or "" for nothing.
std::string told_apart(const Json& tiers, const Json& tier, const char* role) {
  const Json own = keys_of(tier, role);
  std::map<std::string, std::string> shown;
  for (const Json& t : tiers) {
    const Json other = keys_of(t, role);
    if (other.value("name", Json()) != own.at("name")) continue;
    for (const Json* keys : {&own, &other})
      for (const auto& [key, unused] : keys->items()) {
        const Json here = own.value(key, Json()), there = other.value(key, Json());
        if (here == there) continue;
        if (in_short(here) == in_short(there))
          shown[key] = here.dump();
        else
          shown.emplace(key, in_short(here));
      }
  }
  std::string out;
  for (const auto& [key, value] : shown) out += fmt::format("{}{} {}", out.empty() ? " (" : ", ", key, value);
  return out.empty() ? "" : out + ")";
}

}  // namespace

std::string protocol_text(const CachePolicy& policy) {
  if (!policy.codes) return "everything exact";
  if (policy.codes_images) return "image tokens coded, text exact";
  const std::string k = rule_text(policy.k), v = rule_text(policy.v);
  std::string out = k == v ? k : fmt::format("keys: {}; values: {}", k, v);
  if (policy.sinks > 0) out += fmt::format(" + {} sink{}", policy.sinks, policy.sinks == 1 ? "" : "s");
  if (policy.prompt > 0)
    out += fmt::format(", {} a prompt of {} tokens{}", policy.codes_generated ? "after" : "within",
                       grouped_digits(policy.prompt),
                       policy.k.first > 0 || policy.v.first > 0 ? " that is coded whole" : "");
  if (policy.drops) out += ", nothing else";
  if (policy.keep) out += ", " + policy.keep->text();
  return out;
}

std::string codes_nothing(const CachePolicy& policy, int64_t tokens) {
  const auto coded = [&](Role role) { return policy.coded_end(role, tokens - 1) > policy.sinks; };
  if (!policy.codes || coded(Role::kKey) || coded(Role::kValue)) return "";
  return fmt::format(
      "nothing is coded: the longest window of the report documents holds {} tokens, all of them exact under {}",
      tokens, protocol_text(policy));
}

bool off_label(const CodecSet& codecs, const CachePolicy& policy) {
  return policy.keeps_codes() && !policy.codes_images && std::ranges::any_of(codecs.units(), [](const TrainedUnit& u) {
           // By search: another program's codec is no method of this one.
           return std::ranges::any_of(all_methods(), [&](const Method* method) {
             const MethodInfo info = method->describe();
             return info.images_alone && info.name == u.spec.method;
           });
         });
}

bool quantizes_queries(const CodecSet& codecs, const CachePolicy& policy) {
  return policy.keeps_codes() && std::ranges::any_of(codecs.units(), [](const TrainedUnit& u) {
           return u.codec->query_form() != QueryForm::kExact;
         });
}

std::string protocol_text(const CachePolicy& policy, const Json& codec_config) {
  std::string out = protocol_text(policy);
  if (!policy.keeps_codes() || !codec_config.is_object() || !codec_config.contains("tiers")) return out;
  std::string names[2];
  bool newest = true;
  for (const Json& tier : codec_config.at("tiers")) {
    std::string shown[2];
    for (const int r : {0, 1}) {
      const char* key = r == 0 ? "k" : "v";
      const Json& role = tier.at(key);
      if (role.contains("name")) {
        names[r] = role.at("name").get<std::string>();
        shown[r] = names[r] + told_apart(codec_config.at("tiers"), tier, key);
      }
      if (role.contains("level")) shown[r] = level_text(names[r], role.at("level").get<int>());
    }
    const std::string what = shown[0] == shown[1] ? shown[0] : fmt::format("keys {}, values {}", shown[0], shown[1]);
    const std::string tokens =
        tier.contains("tokens") ? grouped_digits(tier.at("tokens").get<int64_t>()) : std::string();
    if (tokens.empty())
      out += ", older " + what;
    else
      out += fmt::format(", {} {}", newest ? tokens + " newest coded tokens" : "next " + tokens, what);
    newest = false;
  }
  return out;
}

std::string level_text(const std::string& method, int level) {
  return fmt::format("{} at {} stage{}", method, level, level == 1 ? "" : "s");
}

std::string published_policy(const Json& codec_config, const Json& cache_config) {
  // By search: a store may hold cells of methods that this program was built without.
  for (const char* role : {"k", "v"})
    for (const Method* method : all_methods()) {
      const MethodInfo info = method->describe();
      if (!codec_config.contains(role) || codec_config[role].at("name") != info.name || !info.presets.is_object())
        continue;
      const auto is_own = [&](const Json& preset) {
        return preset.contains("cache") && canonical_cache_config(preset["cache"]) == cache_config;
      };
      if (is_own(info.presets.value("default", Json::object()))) return info.name + " default";  // of several with one
      for (const auto& [name, preset] : info.presets.items())
        if (is_own(preset)) return info.name + " " + name;
    }
  return "";
}

std::string protocol_of_cell(const Json& config) {
  if (!config.contains("cache")) return "";
  const Json& cache = config.at("cache");
  const std::string preset = published_policy(config.at("codec"), cache);
  const CachePolicy policy = CachePolicy::from_json(cache);
  return protocol_text(policy, config.at("codec")) + (preset.empty() ? "" : fmt::format(" (preset {})", preset));
}

}  // namespace vqkv
