#include "codec/codec_config.h"

#include <fmt/format.h>

#include <algorithm>
#include <optional>
#include <set>

#include "codec/codec_set.h"
#include "codec/transform/transform.h"
#include "config/config.h"
#include "core/error.h"
#include "core/names.h"
#include "core/whole_number.h"

namespace vqkv {

const std::set<std::string>& codec_config::unit_keys() {
  static const std::set<std::string> keys = {"rope", "heads", "share", "transform"};
  return keys;
}

namespace {

using namespace codec_config;

void require_object(const Json& value, const std::string& path) {
  if (!value.is_object()) fail_expected(path, "a map of `key: value` pairs", value);
}

std::string text_of(const Json& config, const std::string& key, const std::string& path) {
  return ConfigReader(config, path).text(key, "");
}

// The preset that a configuration starts from; {} when the method has no default.
Json preset_of(const std::string& method, const Json& config, const std::string& path) {
  const Json presets = find_method(method, path + ".name").describe().presets;
  const std::string name = text_of(config, "preset", path);
  if (!config.contains("preset"))
    return presets.is_object() && presets.contains("default") ? presets["default"] : Json::object();
  if (presets.is_object() && presets.contains(name)) return presets[name];
  std::vector<std::string> names;
  if (presets.is_object())
    for (const auto& [key, value] : presets.items()) names.push_back(key);
  fail_unknown(fmt::format("{}.preset: of codec '{}':", path, method), name, names);
}

}  // namespace

void codec_config::merge_keys(Json& into, const Json& from) {
  if (from.contains("name") && into.contains("name") && from["name"] != into["name"]) {
    Json kept = Json::object();
    for (const std::string& key : unit_keys())
      if (into.contains(key)) kept[key] = into[key];
    into = kept;
  }
  for (const auto& [key, value] : from.items()) into[key] = value;
}

Json codec_config::over_preset(Json given, Role role, const std::string& path) {
  const std::string r = role_name(role);
  ConfigReader(given, path).require("name", "which codec for role " + r + "? (vqkv-sweep ls codecs)");
  const std::string method = text_of(given, "name", path);
  Json out = Json::object();
  out["name"] = method;
  const Json preset = preset_of(method, given, path);
  if (preset.contains("codec")) {
    for (const auto& [key, value] : preset["codec"].items())
      if (key != "k" && key != "v") out[key] = value;
    if (preset["codec"].contains(r)) merge_keys(out, preset["codec"][r]);
  }
  given.erase("preset");
  merge_keys(out, given);
  if (role == Role::kValue) out.erase("rope");
  return out;
}

namespace {

// The keys of one role, common ones first, then its own, over the preset; still unchecked. `codec`: where `config`
// stands.
Json role_config(const Json& config, Role role, const std::string& codec) {
  const std::string r = role_name(role);
  Json given = Json::object();
  for (const auto& [key, value] : config.items())
    if (key != "k" && key != "v" && key != "overrides") given[key] = value;
  std::string path = codec;
  if (config.contains(r)) {
    path = codec + "." + r;
    require_object(config[r], path);
    if (role == Role::kValue && config[r].contains("rope"))
      fail_usage(fmt::format("{}.rope: values are not rotated; rope is a key of {} or {}.k", path, codec, codec));
    merge_keys(given, config[r]);
  }
  return over_preset(given, role, path);
}

Json canonical_transforms(const Json& list, const std::string& path) {
  if (!list.is_array()) fail_expected(path, "a list of transforms", list);
  Json out = Json::array();
  for (size_t i = 0; i < list.size(); ++i) {
    const std::string here = fmt::format("{}[{}]", path, i);
    Json knobs = Json::object();
    std::string name, named = here;
    if (list[i].is_string()) {
      name = list[i].get<std::string>();
    } else {
      require_object(list[i], here);
      name = text_of(list[i], "name", here);
      named += ".name";
      ConfigReader(list[i], here).require("name", "which transform? (vqkv-sweep ls transforms)");
      knobs = list[i];
      knobs.erase("name");
    }
    Json entry = find_transform(name, named).canonical(knobs, here);
    entry["name"] = name;
    out.push_back(entry);
  }
  return out;
}

// The defaults that canonical transforms ask of the method behind them, as far as it has such knobs.
Json suited_knobs(const Method& method, const Json& transforms) {
  Json out = Json::object();
  for (const Json& t : transforms) {
    const Json suits = find_transform(t.at("name").get<std::string>()).describe().suits;
    for (const Knob& knob : method.knobs())
      if (suits.contains(knob.name) &&
          ("|" + knob.range + "|").find("|" + suits[knob.name].get<std::string>() + "|") != std::string::npos)
        out[knob.name] = suits[knob.name];
  }
  return out;
}

}  // namespace

void codec_config::forget_suited(Json& role, const Json& set) {
  if (!set.contains("transform")) return;
  const Method& method = find_method(role["name"].get<std::string>());
  const Json had = suited_knobs(method, role["transform"]);
  for (const auto& [key, value] : had.items())
    if (role[key] == value) role.erase(key);
  const Json plain = method.canonical(Json::object(), "codec");
  const Json wanted = suited_knobs(method, canonical_transforms(set["transform"], "codec"));
  for (const auto& [key, value] : wanted.items())
    if (role.contains(key) && role[key] == plain[key]) role.erase(key);
}

Json codec_config::canonical_role(const Json& raw, Role role, const std::string& path) {
  const std::string method = text_of(raw, "name", path);
  Json knobs = Json::object();
  for (const auto& [key, value] : raw.items())
    if (key != "name" && !unit_keys().contains(key)) knobs[key] = value;
  const Method& m = find_method(method);
  for (const auto& [key, value] : knobs.items()) {
    // The method's own message lists its knobs; a misspelt unit key deserves its nearest name too.
    std::vector<std::string> names(unit_keys().begin(), unit_keys().end());
    bool known = false;
    for (const Knob& k : m.knobs()) {
      names.push_back(k.name);
      known = known || k.name == key;
    }
    if (known) continue;
    fail_unknown_key(path, key, names);
  }
  const Json transforms =
      raw.contains("transform") ? canonical_transforms(raw["transform"], path + ".transform") : Json::array();
  const Json suited = suited_knobs(m, transforms);
  for (const auto& [key, value] : suited.items())
    if (!knobs.contains(key)) knobs[key] = value;
  Json out = m.canonical(knobs, path);
  out["name"] = method;
  ConfigReader reader(raw, path);
  if (role == Role::kKey) out["rope"] = reader.choice("rope", "post", {"post", "pre"});
  out["share"] = reader.choice("share", "none", {"none", "heads", "layers"});
  const Json heads = raw.contains("heads") ? raw["heads"] : Json(1);
  const std::optional<int64_t> whole = whole_number(heads);
  if (!(heads.is_string() && heads == "all") && !(whole && *whole >= 1 && *whole <= 65536))
    fail_expected(path + ".heads", "1, 2, ... or all: the heads of a unit", heads);
  out["heads"] = whole ? Json(*whole) : heads;
  out["transform"] = transforms;
  return out;
}

namespace {

// `layers` or `heads` of an override: "all", a number or a list of numbers.
Json canonical_selection(const Json& value, const std::string& path) {
  if (value.is_string() && value == "all") return value;
  refuse_empty_list(path, value, ", or all");
  const Json list = value.is_array() ? value : Json::array({value});
  std::set<int> numbers;
  for (const Json& v : list) {
    const std::optional<int64_t> number = whole_number(v);
    if (!number || *number < 0 || *number > 65535) fail_expected(path, "all, a number or a list of numbers from 0", v);
    if (!numbers.insert(static_cast<int>(*number)).second)
      fail_usage(fmt::format("{}: {} stands twice", path, *number));
  }
  return Json(numbers);
}

// {layers, heads, set: {k: {...}, v: {...}}}
Json canonical_override(const Json& entry, const std::string& path) {
  ConfigReader reader(entry, path);
  Json out;
  for (const char* selection : {"layers", "heads"}) {
    const Json& given = reader.raw(selection);
    out[selection] = canonical_selection(given.is_null() ? Json("all") : given, fmt::format("{}.{}", path, selection));
  }
  reader.require("set", "what to change");
  reader.finish();
  require_object(entry["set"], path + ".set");
  Json k = Json::object(), v = Json::object();
  for (const auto& [key, value] : entry["set"].items()) {
    if (key == "k" || key == "v") {
      require_object(value, path + ".set." + key);
      for (const auto& [name, item] : value.items()) (key == "k" ? k : v)[name] = item;
    } else if (key.starts_with("k.")) {
      k[key.substr(2)] = value;
    } else if (key.starts_with("v.")) {
      v[key.substr(2)] = value;
    } else if (key.find('.') != std::string::npos) {
      fail_usage(fmt::format("{}.set: unknown key '{}'; a dotted key starts with k. or v.", path, key));
    } else {
      k[key] = value;
      if (key != "rope") v[key] = value;
    }
  }
  if (v.contains("rope")) fail_usage(path + ".set.v.rope: values are not rotated");
  out["set"] = Json::object();
  for (const char* r : {"k", "v"}) {
    const Json& set = *r == 'k' ? k : v;
    if (set.empty()) continue;
    if (set.contains("heads") && out["heads"] != "all")
      fail_usage(path + ": `heads` of a unit can be set for whole layers only");
    out["set"][r] = set;
  }
  if (out["set"].empty()) fail_usage(path + ".set: nothing to change");
  return out;
}

// One role of the codec at `path`. What was written for both roles is refused where it stands, not under the role.
Json canonical_role_of(const Json& config, Role role, const std::string& path) {
  const std::string r = role_name(role), own = path + "." + r;
  if (!config.contains(r)) return canonical_role(role_config(config, role, path), role, path);
  try {
    return canonical_role(role_config(config, role, path), role, own);
  } catch (const Error& e) {
    const std::string message = e.what();
    for (const std::string& lead : {own + ".", own + ": unknown key '"}) {
      if (!message.starts_with(lead)) continue;
      const std::string key = message.substr(lead.size(), message.find_first_of(".[:'", lead.size()) - lead.size());
      if (!config[r].contains(key)) throw Error(e.kind(), path + message.substr(own.size()));
    }
    throw;
  }
}

// One codec for both roles, with its overrides.
Json canonical_codec(const Json& config, const std::string& path) {
  Json out;
  for (const Role role : {Role::kKey, Role::kValue}) out[role_name(role)] = canonical_role_of(config, role, path);
  if (config.contains("overrides")) {
    const Json& list = config["overrides"];
    if (!list.is_array()) fail_expected(path + ".overrides", "a list", list);
    refuse_empty_list(path + ".overrides", list);
    for (size_t i = 0; i < list.size(); ++i)
      out["overrides"].push_back(canonical_override(list[i], fmt::format("{}.overrides[{}]", path, i)));
  }
  return out;
}

}  // namespace

std::string codec_config::tier_path(size_t tier) { return fmt::format("codec.tiers[{}]", tier); }

namespace {

// One tier of several. A role that is a level stands as {level: N}.
Json canonical_tier(const Json& config, size_t tier, bool last) {
  const std::string path = tier_path(tier);
  require_object(config, path);
  ConfigReader reader(config, path);
  if (last && reader.has("tokens"))
    fail_usage(path + ".tokens: the oldest tier holds all tokens that are left; only newer ones say how many they do");
  if (!last) reader.require("tokens", "how many coded tokens does this tier hold before they pass into the next?");
  const int64_t tokens = reader.integer("tokens", 0, 1, kMaxTierTokens);
  Json rest = config, out;
  rest.erase("tokens");
  for (const char* r : {"k", "v"}) {
    const bool own = config.contains(r);
    if (own) require_object(config[r], path + "." + r);
    const bool own_level = own && config[r].contains("level");
    if (!own_level && (!config.contains("level") || (own && config[r].contains("name")))) continue;
    const std::string where = own_level ? path + "." + r : path;
    const Json& from = own_level ? config[r] : config;
    if (tier == 0) fail_usage(where + ".level: the newest tier has no tier before it whose stages it could take");
    for (const auto& [key, value] : from.items())
      if (key != "level" && (own_level || (key != "tokens" && key != "k" && key != "v")))
        fail_usage(fmt::format("{}: a level is the codec of the tier before with fewer stages; '{}' has no place here",
                               where, key));
    out[r] = {{"level", ConfigReader(from, where).integer("level", 0, 1, 65536)}};
    // The other role may name a codec; this one stands in for it while that is read.
    rest.erase(r);
  }
  rest.erase("level");
  if (out.size() == 2) {
    rest.erase("k");
    rest.erase("v");
    for (const auto& [key, value] : rest.items()) fail_unknown_key(path, key, {"tokens", "level", "k", "v"});
  } else if (out.size() == 1) {
    const std::string level = out.contains("k") ? "k" : "v", other = level == "k" ? "v" : "k";
    if (rest.contains("overrides")) fail_usage(path + ".overrides: a tier that is a level in one role takes none");
    const Role role = other == "k" ? Role::kKey : Role::kValue;
    out[other] = canonical_role_of(rest, role, path);
  } else {
    out = canonical_codec(rest, path);
  }
  if (!last) out["tokens"] = tokens;
  return out;
}

}  // namespace

Json canonical_codec_config(const Json& given) {
  require_object(given, "codec");
  const Json codec_config = without_nulls(given);
  if (!codec_config.contains("tiers")) return canonical_codec(codec_config, "codec");
  for (const auto& [key, value] : codec_config.items())
    if (key != "tiers")
      fail_usage(fmt::format("codec.{}: beside `tiers` nothing else has a place; it belongs to a tier", key));
  const Json& tiers = codec_config["tiers"];
  if (!tiers.is_array() || tiers.empty() || tiers.size() > kMaxTiers)
    fail_expected("codec.tiers", fmt::format("a list of 1 to {} codecs, the newest first", kMaxTiers), tiers);
  Json out = Json::array();
  for (size_t i = 0; i < tiers.size(); ++i) out.push_back(canonical_tier(tiers[i], i, i + 1 == tiers.size()));
  return out.size() == 1 ? out[0] : Json{{"tiers", out}};  // one tier is a codec like any other
}

Json trained_part(const Json& canonical) {
  if (!canonical.contains("tiers")) return canonical;
  Json tiers = canonical["tiers"];
  for (Json& tier : tiers) {
    tier.erase("tokens");
    for (const char* r : {"k", "v"})
      if (tier[r].contains("level")) tier.erase(r);
  }
  // Behind the last tier that learns none has a say; one before it has its number, which names random streams.
  while (tiers.back().empty()) tiers.erase(tiers.size() - 1);
  return tiers.size() == 1 ? tiers[0] : Json{{"tiers", tiers}};
}

Json preset_cache_config(const Json& of_codec) {
  require_object(of_codec, "codec");
  const Json codec_config = without_nulls(of_codec);
  if (codec_config.contains("tiers")) {
    const Json& tiers = codec_config["tiers"];
    return tiers.is_array() && !tiers.empty() ? preset_cache_config(tiers[0]) : Json();
  }
  Json wanted[2];
  for (const Role role : {Role::kKey, Role::kValue}) {
    Json given = codec_config;
    for (const char* key : {"k", "v", "overrides"}) given.erase(key);
    if (codec_config.contains(role_name(role))) merge_keys(given, codec_config[role_name(role)]);
    const std::string method = text_of(given, "name", "codec");
    if (method.empty()) continue;
    if (!given.contains("preset")) continue;
    const Json preset = preset_of(method, given, "codec");
    if (preset.contains("cache")) wanted[static_cast<int>(role)] = preset["cache"];
  }
  if (wanted[0] == wanted[1]) return wanted[0];
  Json out = Json::object();
  for (const Role role : {Role::kKey, Role::kValue}) {
    Json rule = wanted[static_cast<int>(role)];
    if (rule.is_null()) continue;
    for (const char* common : {"sinks", "exact_dtype"})
      if (rule.contains(common)) {
        out[common] = rule[common];
        rule.erase(common);
      }
    out[role_name(role)] = rule;
  }
  return out;
}

}  // namespace vqkv
