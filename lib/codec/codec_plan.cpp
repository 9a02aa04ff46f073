// The units of a model that a canonical codec configuration gives.
#include <fmt/format.h>

#include <algorithm>
#include <optional>

#include "codec/codec_config.h"
#include "codec/codec_set.h"
#include "codec/level.h"
#include "codec/transform/transform.h"
#include "core/error.h"

namespace vqkv {
namespace {

using namespace codec_config;

bool selects(const Json& selection, int index) {
  return selection.is_string() || std::find(selection.begin(), selection.end(), index) != selection.end();
}

// Applies the overrides that `wanted(entry)` accepts to one role of one layer, in order, and completes the result.
template <class Wanted>
Json overridden(const Json& canonical, const std::string& codec, Role role, int layer, Wanted wanted) {
  const std::string r = role_name(role);
  Json raw = canonical[r];
  if (!canonical.contains("overrides")) return raw;
  std::string path;
  for (size_t i = 0; i < canonical["overrides"].size(); ++i) {
    const Json& entry = canonical["overrides"][i];
    if (!entry["set"].contains(r) || !selects(entry["layers"], layer) || !wanted(entry)) continue;
    path = fmt::format("{}.overrides[{}].set.{}", codec, i, r);
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
  spec.unit.rope_facts = shape.rope;
  spec.unit.heads = heads;
  spec.unit.layer = layer;
  spec.unit.first_head = first_head;
  spec.unit.rope = role == Role::kKey && role_json["rope"] == "pre" ? RopePlacement::kPre : RopePlacement::kPost;
  spec.method = role_json["name"].get<std::string>();
  spec.transforms = role_json["transform"];
  spec.share = role_json["share"].get<std::string>();
  spec.knobs = Json::object();
  for (const auto& [key, value] : role_json.items())
    if (key != "name" && !unit_keys().contains(key)) spec.knobs[key] = value;
  spec.knobs = find_method(spec.method).in_layer(spec.knobs, layer);
  return spec;
}

int unit_heads(const Json& role_json, const CacheShape& shape) {
  return role_json["heads"].is_string() ? shape.kv_heads : role_json["heads"].get<int>();
}

// One tier of a plan, with the path of its configuration.
struct TierConfig {
  const Json& config;
  std::string path;
  int tier;
};

void resolve_layer(CodecPlan& plan, const TierConfig& of, const CacheShape& shape, int layer, Role role,
                   std::optional<UnitSpec>& checked) {
  const Json whole =
      overridden(of.config, of.path, role, layer, [](const Json& entry) { return entry["heads"] == "all"; });
  const int heads = unit_heads(whole, shape);
  if (heads > shape.kv_heads || shape.kv_heads % heads != 0) {
    if (plan.skip.empty())
      plan.skip = fmt::format("{}: units of {} heads don't divide {} KV heads", of.path, heads, shape.kv_heads);
    return;
  }
  for (int first = 0; first < shape.kv_heads; first += heads) {
    const Json resolved = overridden(of.config, of.path, role, layer, [&](const Json& entry) {
      int chosen = 0;
      for (int h = first; h < first + heads; ++h) chosen += selects(entry["heads"], h);
      if (chosen != 0 && chosen != heads)
        fail_usage(fmt::format("{}.overrides: heads {} cut the unit of heads {}..{} of layer {} in two", of.path,
                               entry["heads"].dump(), first, first + heads - 1, layer));
      return chosen != 0;
    });
    plan.units.push_back(spec_of(resolved, role, shape, layer, first, heads));
    plan.units.back().tier = of.tier;
    const UnitSpec& now = plan.units.back();
    // Most units repeat the one before; whether they can be built does not depend on where they are.
    if (checked && checked->same_codec(now)) continue;
    checked = now;
    const std::string reason = now.check();
    if (!reason.empty() && plan.skip.empty())
      plan.skip = fmt::format("{}: layer {}, role {}: {}: {}", of.path, layer, role_name(role),
                              plan.units.back().method, reason);
  }
}

// The units of one role and layer of the tier before, as a level of them.
void take_level(CodecPlan& plan, const TierConfig& of, int level, int layer, Role role,
                std::optional<UnitSpec>& checked) {
  const size_t before = plan.units.size();
  for (size_t i = 0; i < before; ++i) {
    UnitSpec spec = plan.units[i];
    if (spec.tier != of.tier - 1 || spec.unit.layer != layer || spec.unit.role != role) continue;
    if (!(checked && checked->same_codec(spec)) && plan.skip.empty()) {
      checked = spec;
      const int shorter = spec.level;
      const std::shared_ptr<const Codec> codec = make_codec(spec);
      const std::string reason = level_reason(shorter > 0 ? *codec_level(codec, shorter) : *codec, level);
      if (!reason.empty())
        plan.skip = fmt::format("{}: level {} of codec '{}', layer {}, role {}: {}", of.path, level, spec.method, layer,
                                role_name(role), reason);
    }
    spec.tier = of.tier;
    spec.level = level;
    plan.units.push_back(std::move(spec));
  }
}

void resolve_tier(CodecPlan& plan, const TierConfig& of, const CacheShape& shape) {
  const Json& config = of.config;
  if (config.contains("overrides"))
    for (size_t i = 0; i < config["overrides"].size(); ++i) {
      const Json& entry = config["overrides"][i];
      for (const auto& [key, limit] : {std::pair{"layers", shape.layers}, std::pair{"heads", shape.kv_heads}})
        if (entry[key].is_array())
          for (const Json& index : entry[key])
            if (index >= limit)
              fail_usage(fmt::format("{}.overrides[{}].{}: {} is out of range; the model has {} of them", of.path, i,
                                     key, index.dump(), limit));
    }
  std::optional<UnitSpec> checked[2];
  for (int layer = 0; layer < shape.layers; ++layer)
    for (const Role role : {Role::kKey, Role::kValue}) {
      const Json& own = config[role_name(role)];
      std::optional<UnitSpec>& last = checked[static_cast<int>(role)];
      if (own.contains("level"))
        take_level(plan, of, own["level"].get<int>(), layer, role, last);
      else
        resolve_layer(plan, of, shape, layer, role, last);
    }
}

// Keys are held on one side of RoPE, whatever their age.
void check_placement(CodecPlan& plan, const CacheShape& shape) {
  std::vector<RopePlacement> newest(static_cast<size_t>(shape.layers * shape.kv_heads));
  for (const UnitSpec& u : plan.units)
    for (int h = u.unit.first_head; u.unit.role == Role::kKey && h < u.unit.first_head + u.unit.heads; ++h) {
      RopePlacement& first = newest[static_cast<size_t>(u.unit.layer * shape.kv_heads + h)];
      if (u.tier == 0) first = u.unit.rope;
      if (u.unit.rope != first && plan.skip.empty())
        plan.skip = fmt::format("{}: layer {}: keys of all tiers stand on the same side of RoPE",
                                tier_path(static_cast<size_t>(u.tier)), u.unit.layer);
    }
}

}  // namespace

bool UnitSpec::same_codec(const UnitSpec& other) const {
  return unit.role == other.unit.role && unit.heads == other.unit.heads && unit.rope == other.unit.rope &&
         method == other.method && knobs == other.knobs && transforms == other.transforms && level == other.level;
}

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

CodecPlan resolve_codec(const Json& codec_config, const CacheShape& shape) {
  VQKV_CHECK(shape.layers >= 1 && shape.kv_heads >= 1 && shape.head_dim >= 1);
  CodecPlan plan;
  plan.config = canonical_codec_config(codec_config);
  if (!plan.config.contains("tiers")) {
    resolve_tier(plan, {plan.config, "codec", 0}, shape);
    return plan;
  }
  const Json& tiers = plan.config["tiers"];
  for (size_t i = 0; i < tiers.size(); ++i) {
    resolve_tier(plan, {tiers[i], tier_path(i), static_cast<int>(i)}, shape);
    if (tiers[i].contains("tokens")) plan.tiers.push_back(tiers[i]["tokens"].get<int64_t>());
  }
  check_placement(plan, shape);
  return plan;
}

}  // namespace vqkv
