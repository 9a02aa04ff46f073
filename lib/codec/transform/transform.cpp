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

std::string check_chain(const Json& transforms, const UnitShape& unit) {
  int mixed = 1;
  bool scaled = false;
  for (const Json& t : transforms) {
    const auto name = t.at("name").get<std::string>();
    Json knobs = t;
    knobs.erase("name");
    const auto made = find_transform(name).make(knobs, unit);
    if (name == "query_metric" && unit.rope == RopePlacement::kPre && mixed > 1)
      return "before RoPE query_metric weighs pairs of channels: it comes before transforms that mix them";
    if (made->is_token_scale()) {
      if (scaled) return "a chain holds one token scale at most";
      scaled = true;
      const int width = unit.channels() / made->scale_groups();
      if (width % mixed != 0)
        return fmt::format(
            "token scales of {} channels can't follow a map that mixes {} channels; scale before it, or per {}", width,
            mixed, mixed == unit.head_dim ? "head" : "unit");
    }
    mixed = std::max(mixed, made->mixed_channels());
  }
  return "";
}

}  // namespace vqkv
