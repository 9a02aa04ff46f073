// A codec configuration resolved for a model, and the frozen codecs of every (layer, unit, role).
#pragma once
#include <cstdint>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "codec/codec.h"
#include "core/cache_shape.h"

namespace vqkv {

// One (layer, unit, role): which method, with which knobs.
struct UnitSpec {
  UnitShape unit;
  std::string method;          // registry name
  Json knobs;                  // canonical
  Json transforms;             // canonical array of {name, ...knobs}
  std::string share = "none";  // codebook sharing: none | heads (one codec a layer) | layers (one a role)
  int tier = 0;                // 0: what tokens are coded with first; then by age
  int level = 0;               // > 0: the first `level` stages of the codec of the tier before, whose spec this is
  std::string check() const;   // reason why it can't be built, or ""
  // One configuration of one size, wherever the unit stands.
  bool same_codec(const UnitSpec& other) const;
};

// `codec:` of a configuration resolved against a shape: every unit of every layer, both roles, overrides applied.
//   codec: {name: rvq, codebooks: 4, rope: post, heads: 1, share: none, transform: [center], k: {...}, v: {...},
//           overrides: [{layers: [0, 1], heads: all, set: {k.bits: 8}}]}
// Keys of `codec` beside the method's knobs: name; preset; rope: post|pre (keys only); heads: 1, 2, ... or all (heads
// of a unit); share: none|heads|layers; transform: names or {name, knobs}; k, v (the same keys for one role, which win;
// a role that names another method takes that method's defaults instead of the common knobs); overrides (in order,
// later wins; `layers`, `heads`: all or a list, `set`: keys of one or both roles, dotted or nested). heads (unit size)
// that doesn't divide kv_heads, or a method that can't code the unit, gives a reason in `skip`.
//   codec: {tiers: [{tokens: 1024, name: rvq, ...}, {level: 2}, ...]}
// Tiers by age, the newest first; each but the last says how many coded tokens it holds. A tier is a codec as above, or
// in one role or both a level: that many stages of the tier before, whose codes are cut and never coded again.
struct CodecPlan {
  Json config;                  // canonical, without overrides expanded
  std::vector<UnitSpec> units;  // ordered by (tier, layer, role, first_head)
  std::vector<int64_t> tiers;   // tokens of every tier but the last; empty: one tier
  std::string skip;             // non-empty: the cell is skipped with this reason, which names its path
};
inline constexpr size_t kMaxTiers = 16;
inline constexpr int64_t kMaxTierTokens = int64_t{1} << 24;
CodecPlan resolve_codec(const Json& codec_config, const CacheShape& shape);
// The canonical form, {k: {...}, v: {...}, overrides?: [...]} with all defaults, or {tiers: [...]} of such: a fixed
// point of itself. Throws kUsage for unknown keys (nearest name), wrong types and ranges. Overrides are checked for
// their form here, for their layers, heads and knobs by resolve_codec.
Json canonical_codec_config(const Json& codec_config);
// What of a canonical form decides what its codecs learn. The tokens of a tier move a boundary and a level cuts codes:
// configurations that differ there alone share this and one training.
Json trained_part(const Json& canonical);
// The `cache:` section of the presets that a configuration names (KIVI's rule with `preset: default`), or null: without
// a preset all methods stand on equal ground. Takes the configuration as written: the canonical form no longer knows
// its preset.
Json preset_cache_config(const Json& codec_config);

// An untrained codec of the unit, transforms included; train or load it. Throws kUsage with spec.check()'s reason.
std::unique_ptr<Codec> make_codec(const UnitSpec& spec);

struct TrainedUnit {
  UnitSpec spec;
  std::shared_ptr<const Codec> codec;  // shared between units when `share` says so
  TrainReport report;
};

// Gives the units of `units` that are levels their codecs, those of the tier before at that level. kUsage where there
// is none; kBadData where the tier before has other units.
void set_levels(std::vector<TrainedUnit>& units);

class CodecSet;
// `trained` in the tiers and at the levels of `plan`, whose trained_part is the same.
std::shared_ptr<const CodecSet> fit_to_plan(std::shared_ptr<const CodecSet> trained, const CodecPlan& plan);

// Frozen codecs for a model. codec(layer, head, role) gives the unit that holds the head and the head's index in it.
class CodecSet {
 public:
  // tiers: CodecPlan::tiers. kUsage where a codec can't be one of several tiers.
  CodecSet(CacheShape shape, Json config, std::vector<TrainedUnit> units, std::string model_hash,
           std::vector<int64_t> tiers = {});
  const CacheShape& shape() const { return shape_; }
  const Json& config() const { return config_; }
  const std::string& model_hash() const { return model_hash_; }
  const std::vector<TrainedUnit>& units() const { return units_; }
  int tiers() const { return static_cast<int>(tier_tokens_.size()) + 1; }
  const std::vector<int64_t>& tier_tokens() const { return tier_tokens_; }  // of every tier but the last
  // Coded tokens that the tiers before this one hold.
  int64_t newer_tokens(int tier) const {
    return std::accumulate(tier_tokens_.begin(), tier_tokens_.begin() + tier, int64_t{0});
  }
  // Index into units(); the head's place in the unit is head - units()[i].spec.unit.first_head.
  int unit_index(int layer, int head, Role role, int tier = 0) const;
  // The unit one layer below whose decoded rows this one sees (Codec::sees_lower), or -1: it sees none, or is in layer
  // 0.
  int lower_unit(size_t unit) const { return lower_[unit]; }
  bool sees_lower() const;  // some unit does
  // The most tokens of a prompt that some codec needs to fit its parameters (Codec::fit_needs); 0: none fits any.
  int64_t fit_minimum() const;
  // Model-side constants, each shared codec and book once.
  int64_t constant_bytes() const;

 private:
  CacheShape shape_;
  Json config_;
  std::vector<TrainedUnit> units_;
  std::string model_hash_;
  std::vector<int64_t> tier_tokens_;
  std::vector<int> index_;  // (tier, layer, role, head) -> unit
  std::vector<int> lower_;  // (units)
};

// The codec that stores exact values (`exact`, post-RoPE) in `dtype` (f16, bf16 or f32): trains nothing.
std::shared_ptr<const CodecSet> exact_codec_set(const CacheShape& shape, DType dtype = DType::kF16);

}  // namespace vqkv
