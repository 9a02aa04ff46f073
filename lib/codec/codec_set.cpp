#include "codec/codec_set.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <set>

#include "codec/level.h"
#include "core/error.h"

namespace vqkv {

void set_levels(std::vector<TrainedUnit>& units) {
  std::map<std::pair<const Codec*, int>, std::shared_ptr<const Codec>> made;
  for (TrainedUnit& u : units) {
    if (u.spec.level == 0) continue;
    const UnitShape& at = u.spec.unit;
    const auto before = std::find_if(units.begin(), units.end(), [&](const TrainedUnit& o) {
      const UnitShape& other = o.spec.unit;
      return o.spec.tier == u.spec.tier - 1 && other.layer == at.layer && other.role == at.role &&
             other.first_head == at.first_head && other.heads == at.heads;
    });
    if (before == units.end() || !before->codec)
      fail_data(fmt::format("codec set: layer {}, role {}, head {}: a level of tier {}, which has no such unit",
                            at.layer, role_name(at.role), at.first_head, u.spec.tier - 1));
    std::shared_ptr<const Codec>& level = made[{before->codec.get(), u.spec.level}];
    if (!level) level = codec_level(before->codec, u.spec.level);
    u.codec = level;
  }
}

std::shared_ptr<const CodecSet> fit_to_plan(std::shared_ptr<const CodecSet> trained, const CodecPlan& plan) {
  if (trained->config() == plan.config) return trained;
  std::vector<TrainedUnit> units;
  for (const UnitSpec& spec : plan.units) {
    const UnitShape& u = spec.unit;
    units.push_back({spec, nullptr, {}});
    if (spec.level > 0) continue;
    const TrainedUnit& made =
        trained->units()[static_cast<size_t>(trained->unit_index(u.layer, u.first_head, u.role, spec.tier))];
    units.back().codec = made.codec;
    units.back().report = made.report;
  }
  set_levels(units);
  return std::make_shared<CodecSet>(trained->shape(), plan.config, std::move(units), trained->model_hash(), plan.tiers);
}

CodecSet::CodecSet(CacheShape shape, Json config, std::vector<TrainedUnit> units, std::string model_hash,
                   std::vector<int64_t> tiers)
    : shape_(std::move(shape)),
      config_(std::move(config)),
      units_(std::move(units)),
      model_hash_(std::move(model_hash)),
      tier_tokens_(std::move(tiers)) {
  const size_t heads = static_cast<size_t>(shape_.layers) * 2 * static_cast<size_t>(shape_.kv_heads);
  index_.assign(heads * (tier_tokens_.size() + 1), -1);
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
    const int tier = units_[i].spec.tier;
    if (tier < 0 || tier >= this->tiers()) fail_data(fmt::format("{}: tier {} of {}", where(), tier, this->tiers()));
    if (!units_[i].codec || units_[i].codec->channels() != u.channels())
      fail_data(where() + ": its codec has other channels");
    for (int h = u.first_head; h < u.first_head + u.heads; ++h) {
      int& slot = index_[static_cast<size_t>(tier) * heads +
                         static_cast<size_t>((u.layer * 2 + (u.role == Role::kValue)) * shape_.kv_heads + h)];
      if (slot >= 0) fail_data(where() + ": a head is held by two units");
      slot = static_cast<int>(i);
    }
  }
  if (std::find(index_.begin(), index_.end(), -1) != index_.end()) fail_data("codec set: some heads have no codec");
  for (const TrainedUnit& u : units_) {
    if (this->tiers() == 1) break;
    const Codec& codec = *u.codec;
    const auto refuse = [&](const char* reason) {
      fail_usage(fmt::format("codec.tiers[{}]: codec '{}', layer {}, role {}: {}", u.spec.tier, u.spec.method,
                             u.spec.unit.layer, role_name(u.spec.unit.role), reason));
    };
    if (codec.sees_lower()) refuse("it sees the rows of the layer below, which change as tokens age");
    if (codec.plan().score.kind != ScoreMap::Kind::kNone)
      refuse("it maps the scores of the whole coded segment, which is one tier's here");
    if (codec.query_form() != QueryForm::kExact)
      refuse("its queries are rounded for the whole coded segment, which is one tier's here");
    if (codec.rope() !=
        units_[static_cast<size_t>(unit_index(u.spec.unit.layer, u.spec.unit.first_head, u.spec.unit.role))]
            .codec->rope())
      refuse("keys of all tiers stand on the same side of RoPE");
  }
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

int64_t CodecSet::fit_minimum() const {
  int64_t tokens = 0;
  for (const TrainedUnit& u : units_) tokens = std::max(tokens, u.codec->fit_needs().tokens);
  return tokens;
}

bool CodecSet::sees_lower() const {
  return std::any_of(lower_.begin(), lower_.end(), [](int unit) { return unit >= 0; });
}

int CodecSet::unit_index(int layer, int head, Role role, int tier) const {
  VQKV_CHECK(layer >= 0 && layer < shape_.layers && head >= 0 && head < shape_.kv_heads && tier >= 0 && tier < tiers());
  return index_[static_cast<size_t>(((tier * shape_.layers + layer) * 2 + (role == Role::kValue)) * shape_.kv_heads +
                                    head)];
}

int64_t CodecSet::constant_bytes() const {
  int64_t bytes = 0;
  std::set<const Codec*> seen;
  CountedBooks counted;
  for (const TrainedUnit& u : units_)
    if (seen.insert(u.codec.get()).second) bytes += u.codec->constant_bytes(counted);
  return bytes;
}

std::shared_ptr<const CodecSet> exact_codec_set(const CacheShape& shape, DType dtype) {
  const CodecPlan plan = resolve_codec({{"name", "exact"}, {"dtype", std::string(dtype_name(dtype))}}, shape);
  std::vector<TrainedUnit> units;
  for (const UnitSpec& spec : plan.units) units.push_back({spec, make_codec(spec), {}});
  return std::make_shared<CodecSet>(shape, plan.config, std::move(units), "");
}

}  // namespace vqkv
