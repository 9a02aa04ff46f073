#include "codec/transform/transform.h"

#include <fmt/format.h>

#include <algorithm>

#include "core/error.h"
#include "core/names.h"

namespace vqkv {

#define VQKV_TRANSFORM(name) const TransformKind& vqkv_transform_##name();
#include "codec/transform/transforms.inc"
#undef VQKV_TRANSFORM

const std::vector<const TransformKind*>& all_transforms() {
  static const std::vector<const TransformKind*> kinds = {
#define VQKV_TRANSFORM(name) &vqkv_transform_##name(),
#include "codec/transform/transforms.inc"
#undef VQKV_TRANSFORM
  };
  return kinds;
}

const TransformKind& find_transform(const std::string& name, const std::string& path) {
  static const std::vector<std::string> names =
      [] {  // describing every entry anew would dominate the resolution of plans
        std::vector<std::string> all;
        for (const TransformKind* m : all_transforms()) all.push_back(m->describe().name);
        return all;
      }();
  const auto it = std::find(names.begin(), names.end(), name);
  if (it != names.end()) return *all_transforms()[static_cast<size_t>(it - names.begin())];
  fail_unknown(path.empty() ? "transform" : path + ": transform", name, names);
}

void ChainShape::follow(const Transform& t) {
  const UnitShape next = t.coded(unit);
  const bool turned = mixed > 1;
  // What fewer channels are made of is mixed as a whole.
  mixed = next.channels() == unit.channels() ? std::max(mixed, t.mixed_channels()) : t.mixed_channels();
  scaled = scaled || t.is_token_scale();
  rotated = rotated && t.only_signs() && !(turned && t.mixed_channels() > 1);
  unit = next;
}

namespace {

// The chain, as far as it can be made; the reason why not.
std::string extend_chain(const Json& transforms, ChainShape& behind, std::vector<std::unique_ptr<Transform>>& chain) {
  for (const Json& t : transforms) {
    const auto name = t.at("name").get<std::string>();
    const TransformKind& kind = find_transform(name);
    Json knobs = t;
    knobs.erase("name");
    if (const std::string reason = kind.check(knobs, behind.unit); !reason.empty()) return name + ": " + reason;
    chain.push_back(kind.make(knobs, behind.unit));
    const Transform& made = *chain.back();
    if (name == "query_metric" && behind.unit.rope == RopePlacement::kPre && behind.mixed > 1)
      return "before RoPE query_metric weighs pairs of channels: it comes before transforms that mix them";
    if (made.is_token_scale()) {
      if (behind.scaled) return "a chain holds one token scale at most";
      const int width = behind.unit.channels() / made.scale_groups();
      if (width % behind.mixed != 0)
        return fmt::format(
            "token scales of {} channels can't follow a map that mixes {} channels; scale before it, or per {}", width,
            behind.mixed, behind.mixed == behind.unit.head_dim ? "head" : "unit");
    }
    behind.follow(made);
  }
  return "";
}

}  // namespace

std::vector<std::unique_ptr<Transform>> make_chain(const Json& transforms, const UnitShape& unit, ChainShape* behind) {
  std::vector<std::unique_ptr<Transform>> chain;
  ChainShape shape{unit};
  const std::string reason = extend_chain(transforms, shape, chain);
  if (!reason.empty()) fail_usage(reason);
  if (behind) *behind = shape;
  return chain;
}

std::string check_chain(const Json& transforms, const UnitShape& unit, ChainShape* behind) {
  std::vector<std::unique_ptr<Transform>> chain;
  ChainShape shape{unit};
  const std::string reason = extend_chain(transforms, shape, chain);
  if (behind) *behind = shape;
  return reason;
}

}  // namespace vqkv
