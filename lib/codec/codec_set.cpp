#include "codec/codec_set.h"

#include <fmt/format.h>

#include <algorithm>
#include <optional>
#include <set>

#include "codec/transform/transform.h"
#include "config/config.h"
#include "core/error.h"
#include "core/names.h"
#include "core/whole_number.h"

namespace vqkv {
namespace {

// Keys that belong to the unit, not to the method.
const std::set<std::string> kUnitKeys = {"rope", "heads", "share", "transform"};

void require_object(const Json& value, const std::string& path) {
  if (!value.is_object()) fail_expected(path, "a map of `key: value` pairs", value);
}

std::string text_of(const Json& config, const std::string& key, const std::string& path) {
  return ConfigReader(config, path).text(key, "");
}

// The preset that a configuration starts from; {} when the method has no default.
Json preset_of(const std::string& method, const Json& config, const std::string& path) {
  const Json presets = find_method(method).describe().presets;
  const std::string name = text_of(config, "preset", path);
  if (name.empty()) return presets.is_object() && presets.contains("default") ? presets["default"] : Json::object();
  if (presets.is_object() && presets.contains(name)) return presets[name];
  std::vector<std::string> names;
  if (presets.is_object())
    for (const auto& [key, value] : presets.items()) names.push_back(key);
  fail_unknown(fmt::format("{}.preset: of codec '{}':", path, method), name, names);
}

// `from`'s keys over `into`; naming another method drops the knobs gathered so far.
void merge_keys(Json& into, const Json& from) {
  if (from.contains("name") && into.contains("name") && from["name"] != into["name"]) {
    Json kept = Json::object();
    for (const std::string& key : kUnitKeys)
      if (into.contains(key)) kept[key] = into[key];
    into = kept;
  }
  for (const auto& [key, value] : from.items()) into[key] = value;
}

// `given` (one role's keys, unchecked) over the preset that it names or the method's default.
Json over_preset(Json given, Role role, const std::string& path) {
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

// The keys of one role, common ones first, then its own, over the preset; still unchecked.
Json role_config(const Json& config, Role role) {
  const std::string r = role_name(role);
  Json given = Json::object();
  for (const auto& [key, value] : config.items())
    if (key != "k" && key != "v" && key != "overrides") given[key] = value;
  std::string path = "codec";
  if (config.contains(r)) {
    path = "codec." + r;
    require_object(config[r], path);
    if (role == Role::kValue && config[r].contains("rope"))
      fail_usage("codec.v.rope: values are not rotated; rope is a key of codec or codec.k");
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
    std::string name;
    if (list[i].is_string()) {
      name = list[i].get<std::string>();
    } else {
      require_object(list[i], here);
      name = text_of(list[i], "name", here);
      ConfigReader(list[i], here).require("name", "which transform? (vqkv-sweep ls transforms)");
      knobs = list[i];
      knobs.erase("name");
    }
    Json entry = find_transform(name, here).canonical(knobs, here);
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

// Takes away what a complete role got from its transforms, where `set` brings others: their defaults hold then.
void forget_suited(Json& role, const Json& set) {
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

// One role, checked and complete.
Json canonical_role(const Json& raw, Role role, const std::string& path) {
  const std::string method = text_of(raw, "name", path);
  Json knobs = Json::object();
  for (const auto& [key, value] : raw.items())
    if (key != "name" && !kUnitKeys.contains(key)) knobs[key] = value;
  const Method& m = find_method(method);
  for (const auto& [key, value] : knobs.items()) {
    // The method's own message lists its knobs; a misspelt unit key deserves its nearest name too.
    std::vector<std::string> names(kUnitKeys.begin(), kUnitKeys.end());
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

// `layers` or `heads` of an override: "all", a number or a list of numbers.
Json canonical_selection(const Json& value, const std::string& path) {
  if (value.is_string() && value == "all") return value;
  refuse_empty_list(path, value, ", or all");
  const Json list = value.is_array() ? value : Json::array({value});
  std::set<int> numbers;
  for (const Json& v : list) {
    const std::optional<int64_t> number = whole_number(v);
    if (!number || *number < 0 || *number > 65535) fail_expected(path, "all, a number or a list of numbers from 0", v);
    numbers.insert(static_cast<int>(*number));
  }
  return Json(numbers);
}

bool selects(const Json& selection, int index) {
  return selection.is_string() || std::find(selection.begin(), selection.end(), index) != selection.end();
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

// Applies the overrides that `wanted(entry)` accepts to one role of one layer, in order, and completes the result.
template <class Wanted>
Json overridden(const Json& canonical, Role role, int layer, Wanted wanted) {
  const std::string r = role_name(role);
  Json raw = canonical[r];
  if (!canonical.contains("overrides")) return raw;
  std::string path;
  for (size_t i = 0; i < canonical["overrides"].size(); ++i) {
    const Json& entry = canonical["overrides"][i];
    if (!entry["set"].contains(r) || !selects(entry["layers"], layer) || !wanted(entry)) continue;
    path = fmt::format("codec.overrides[{}].set.{}", i, r);
    Json set = entry["set"][r];
    if (set.contains("name") || set.contains("preset")) {
      // Another method (or preset): its own defaults, in the units that stand.
      for (const char* key : {"name", "heads", "share"})
        if (!set.contains(key)) set[key] = raw[key];
      raw = over_preset(set, role, path);
    } else {
      forget_suited(raw, set);
      merge_keys(raw, set);
    }
    raw = canonical_role(raw, role, path);
  }
  return raw;
}

UnitSpec spec_of(const Json& role_json, Role role, const CacheShape& shape, int layer, int first_head, int heads) {
  UnitSpec spec;
  spec.unit.role = role;
  spec.unit.head_dim = shape.head_dim;
  spec.unit.rotary_dim = shape.rope.rotary_dim;
  spec.unit.heads = heads;
  spec.unit.layer = layer;
  spec.unit.first_head = first_head;
  spec.unit.rope = role == Role::kKey && role_json["rope"] == "pre" ? RopePlacement::kPre : RopePlacement::kPost;
  spec.method = role_json["name"].get<std::string>();
  spec.transforms = role_json["transform"];
  spec.share = role_json["share"].get<std::string>();
  spec.knobs = Json::object();
  for (const auto& [key, value] : role_json.items())
    if (key != "name" && !kUnitKeys.contains(key)) spec.knobs[key] = value;
  return spec;
}

int unit_heads(const Json& role_json, const CacheShape& shape) {
  return role_json["heads"].is_string() ? shape.kv_heads : role_json["heads"].get<int>();
}

void resolve_layer(CodecPlan& plan, const CacheShape& shape, int layer, Role role, std::optional<UnitSpec>& checked) {
  const Json whole = overridden(plan.config, role, layer, [](const Json& entry) { return entry["heads"] == "all"; });
  const int heads = unit_heads(whole, shape);
  if (heads > shape.kv_heads || shape.kv_heads % heads != 0) {
    if (plan.skip.empty()) plan.skip = fmt::format("units of {} heads don't divide {} KV heads", heads, shape.kv_heads);
    return;
  }
  for (int first = 0; first < shape.kv_heads; first += heads) {
    const Json resolved = overridden(plan.config, role, layer, [&](const Json& entry) {
      int chosen = 0;
      for (int h = first; h < first + heads; ++h) chosen += selects(entry["heads"], h);
      if (chosen != 0 && chosen != heads)
        fail_usage(fmt::format("codec.overrides: heads {} cut the unit of heads {}..{} of layer {} in two",
                               entry["heads"].dump(), first, first + heads - 1, layer));
      return chosen != 0;
    });
    plan.units.push_back(spec_of(resolved, role, shape, layer, first, heads));
    const UnitSpec& now = plan.units.back();
    // Most units repeat the one before; whether they can be built does not depend on where they are.
    const bool repeated = checked && checked->unit.role == role && checked->unit.heads == heads &&
                          checked->unit.rope == now.unit.rope && checked->method == now.method &&
                          checked->knobs == now.knobs && checked->transforms == now.transforms;
    if (repeated) continue;
    checked = now;
    const std::string reason = now.check();
    if (!reason.empty() && plan.skip.empty())
      plan.skip = fmt::format("layer {}, role {}: {}: {}", layer, role_name(role), plan.units.back().method, reason);
  }
}

}  // namespace

std::string UnitSpec::check() const {
  const Method& m = find_method(method);
  const MethodInfo info = m.describe();
  const std::string placement = unit.rope == RopePlacement::kPre ? "pre" : "post";
  if (unit.role == Role::kKey && std::find(info.rope.begin(), info.rope.end(), placement) == info.rope.end())
    return fmt::format("codes keys {}-RoPE only, not {}-RoPE", info.rope.empty() ? "" : info.rope[0], placement);
  ChainShape behind;
  std::string reason = check_chain(transforms, unit, &behind);
  if (!reason.empty()) return reason;
  reason = m.check(knobs, behind.unit);
  if (!reason.empty() && behind.unit.channels() != unit.channels())
    reason += fmt::format(" (behind its transforms the unit has {} heads of {} channels)", behind.unit.heads,
                          behind.unit.head_dim);
  if (reason.empty() && !transforms.empty()) reason = check_inner(behind, unit, *m.make(knobs, behind.unit));
  return reason;
}

std::unique_ptr<Codec> make_codec(const UnitSpec& spec) {
  const std::string reason = spec.check();
  if (!reason.empty())
    fail_usage(fmt::format("codec '{}', layer {}, role {}: {}", spec.method, spec.unit.layer, role_name(spec.unit.role),
                           reason));
  ChainShape behind;
  auto chain = make_chain(spec.transforms, spec.unit, &behind);
  return with_transforms(std::move(chain), find_method(spec.method).make(spec.knobs, behind.unit), spec.unit);
}

Json canonical_codec_config(const Json& given) {
  require_object(given, "codec");
  const Json codec_config = without_nulls(given);
  Json out;
  for (const Role role : {Role::kKey, Role::kValue}) {
    const std::string r = role_name(role);
    out[r] = canonical_role(role_config(codec_config, role), role, codec_config.contains(r) ? "codec." + r : "codec");
  }
  if (codec_config.contains("overrides")) {
    const Json& list = codec_config["overrides"];
    if (!list.is_array()) fail_expected("codec.overrides", "a list", list);
    refuse_empty_list("codec.overrides", list);
    for (size_t i = 0; i < list.size(); ++i)
      out["overrides"].push_back(canonical_override(list[i], fmt::format("codec.overrides[{}]", i)));
  }
  return out;
}

Json preset_cache_config(const Json& of_codec) {
  require_object(of_codec, "codec");
  const Json codec_config = without_nulls(of_codec);
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

CodecPlan resolve_codec(const Json& codec_config, const CacheShape& shape) {
  VQKV_CHECK(shape.layers >= 1 && shape.kv_heads >= 1 && shape.head_dim >= 1);
  CodecPlan plan;
  plan.config = canonical_codec_config(codec_config);
  if (plan.config.contains("overrides"))
    for (size_t i = 0; i < plan.config["overrides"].size(); ++i) {
      const Json& entry = plan.config["overrides"][i];
      for (const auto& [key, limit] : {std::pair{"layers", shape.layers}, std::pair{"heads", shape.kv_heads}})
        if (entry[key].is_array())
          for (const Json& index : entry[key])
            if (index >= limit)
              fail_usage(fmt::format("codec.overrides[{}].{}: {} is out of range; the model has {} of them", i, key,
                                     index.dump(), limit));
    }
  std::optional<UnitSpec> checked[2];
  for (int layer = 0; layer < shape.layers; ++layer)
    for (const Role role : {Role::kKey, Role::kValue})
      resolve_layer(plan, shape, layer, role, checked[static_cast<int>(role)]);
  return plan;
}

CodecSet::CodecSet(CacheShape shape, Json config, std::vector<TrainedUnit> units, std::string model_hash)
    : shape_(std::move(shape)),
      config_(std::move(config)),
      units_(std::move(units)),
      model_hash_(std::move(model_hash)) {
  index_.assign(static_cast<size_t>(shape_.layers) * 2 * static_cast<size_t>(shape_.kv_heads), -1);
  for (size_t i = 0; i < units_.size(); ++i) {
    const UnitShape& u = units_[i].spec.unit;
    const auto where = [&] {
      return fmt::format("codec set: layer {}, role {}, heads {}..{}", u.layer, role_name(u.role), u.first_head,
                         u.first_head + u.heads - 1);
    };
    if (u.layer < 0 || u.layer >= shape_.layers || u.first_head < 0 || u.heads < 1 ||
        u.heads > shape_.kv_heads - u.first_head || u.head_dim != shape_.head_dim)
      fail_data(fmt::format("{}: not a unit of a model with {} layers, {} KV heads of {} channels", where(),
                            shape_.layers, shape_.kv_heads, shape_.head_dim));
    if (!units_[i].codec || units_[i].codec->channels() != u.channels())
      fail_data(where() + ": its codec has other channels");
    for (int h = u.first_head; h < u.first_head + u.heads; ++h) {
      int& slot = index_[static_cast<size_t>((u.layer * 2 + (u.role == Role::kValue)) * shape_.kv_heads + h)];
      if (slot >= 0) fail_data(where() + ": a head is held by two units");
      slot = static_cast<int>(i);
    }
  }
  if (std::find(index_.begin(), index_.end(), -1) != index_.end()) fail_data("codec set: some heads have no codec");
  lower_.assign(units_.size(), -1);
  for (size_t i = 0; i < units_.size(); ++i) {
    const UnitShape& u = units_[i].spec.unit;
    const Codec& codec = *units_[i].codec;
    if (!codec.sees_lower() || u.layer == 0) continue;
    lower_[i] = unit_index(u.layer - 1, u.first_head, u.role);
    const TrainedUnit& below = units_[static_cast<size_t>(lower_[i])];
    const char* differs = nullptr;
    if (below.spec.unit.first_head != u.first_head || below.spec.unit.heads != u.heads) differs = "the same heads";
    if (below.codec->rope() != codec.rope()) differs = "keys on the same side of RoPE";
    if (codec.layout().block_tokens % below.codec->layout().block_tokens != 0)
      differs = "a block of tokens that divides its own";
    if (differs)
      fail_usage(
          fmt::format("codec '{}', layer {}, role {}: it sees the rows of the layer below, whose codec '{}' needs "
                      "{}",
                      units_[i].spec.method, u.layer, role_name(u.role), below.spec.method, differs));
  }
}

bool CodecSet::sees_lower() const {
  return std::any_of(lower_.begin(), lower_.end(), [](int unit) { return unit >= 0; });
}

int CodecSet::unit_index(int layer, int head, Role role) const {
  VQKV_CHECK(layer >= 0 && layer < shape_.layers && head >= 0 && head < shape_.kv_heads);
  return index_[static_cast<size_t>((layer * 2 + (role == Role::kValue)) * shape_.kv_heads + head)];
}

int64_t CodecSet::constant_bytes() const {
  int64_t bytes = 0;
  std::set<const Codec*> seen;
  for (const TrainedUnit& u : units_)
    if (seen.insert(u.codec.get()).second) bytes += u.codec->constant_bytes();
  return bytes;
}

std::shared_ptr<const CodecSet> exact_codec_set(const CacheShape& shape, DType dtype) {
  const CodecPlan plan = resolve_codec({{"name", "exact"}, {"dtype", std::string(dtype_name(dtype))}}, shape);
  std::vector<TrainedUnit> units;
  for (const UnitSpec& spec : plan.units) units.push_back({spec, make_codec(spec), {}});
  return std::make_shared<CodecSet>(shape, plan.config, std::move(units), "");
}

}  // namespace vqkv
