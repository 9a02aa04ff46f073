// CacheView: what attention may see of a cache. Const, cheap to copy, valid while the cache lives and until it is next
// changed.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "cache/cache.h"
#include "cache/model.h"
#include "cache/recalled.h"

namespace vqkv {

class SequenceMap;

class CacheView {
 public:
  CacheView(const CompressedCache& cache);  // implicit: a cache is read through its view
  explicit CacheView(const SequenceMap& map);

  const CacheShape& shape() const { return model_->shape(); }
  const CachePolicy& policy() const { return *policy_; }
  const RopeTable& rope() const { return model_->rope(); }
  int64_t length() const;           // tokens before the open block
  int64_t tokens(int layer) const;  // that the layer holds, those of the open block included
  // Tiers of codes by age, the newest first; 1 where nothing is kept as codes.
  int tiers() const { return policy_->keeps_codes() ? model_->tiers() : 1; }
  // End of what the query at `position` sees coded (CompressedCache::coded_end), in `tier` or an older one: of the
  // tokens [sinks, coded_end(r, p, 0)), tier t holds [coded_end(r, p, t + 1), coded_end(r, p, t)) and the last the
  // rest.
  int64_t coded_end(Role role, int64_t position, int tier = 0) const;
  // Extents of one layer and role: [sinks, coded_end) is there as codes, [exact_begin, tokens) exactly.
  int64_t coded_end(int layer, Role role) const;
  int64_t exact_begin(int layer, Role role) const;

  // Units and how the open block decodes them (Visibility::kDraft), the sequence's own parameters included. unit_of is
  // -1 in a cache without codecs.
  int unit_of(int layer, int head, Role role, int tier = 0) const { return model_->unit_of(layer, head, role, tier); }
  std::span<const size_t> layer_units(int layer, int tier = 0) const { return model_->layer_units(layer, tier); }
  // The unit one layer below whose rows this one's plan adds, or -1.
  int added_unit(size_t unit) const { return form(unit).plan.adds_lower ? model_->units()[unit].lower : -1; }
  const UnitShape& unit_shape(size_t unit) const { return model_->units()[unit].shape; }
  const CodedForm& form(size_t unit) const;
  const SequenceState* state(size_t unit) const;  // null: nothing was fitted
  bool keys_post_rope(int layer, int head) const { return model_->keys_post_rope(layer, head); }
  // Of one head; only in a cache with codecs.
  const DecodePlan& plan(int layer, int head, Role role, int tier = 0) const {
    return form(unit(layer, head, role, tier)).plan;
  }
  const TileDecoder& decoder(int layer, int head, Role role, int tier = 0) const {
    const size_t u = unit(layer, head, role, tier);
    return form(u).decoders[static_cast<size_t>(head - unit_shape(u).first_head)];
  }
  // Slots count from the first coded token of the sequence in every tier; each holds slots [slot_begin, + slots).
  CodedBody body(int layer, int head, Role role, int tier = 0) const;
  // Positions of the tokens that the unit holds as codes, ascending; empty where slot s is token sinks + s.
  bool lists_slots(size_t unit) const;
  std::span<const int32_t> slot_positions(size_t unit) const;

  // Exact rows of a head, tokens [first, first + count), none of them coded away. Keys come transposed:
  // out[channel * stride + i]; values as rows: out[i * stride + channel]. fp32.
  void load_keys(int layer, int head, int64_t first, int64_t count, float* out, int64_t stride) const;
  void load_values(int layer, int head, int64_t first, int64_t count, float* out, int64_t stride) const;

  // All coded tokens of a unit in the order of its slots, unpacked: for the reference backend and for judging, never on
  // a fast path.
  CodeBlock fetch_codes(size_t unit) const;
  // The same of slots [first, first + count), whole codec blocks.
  CodeBlock fetch_codes(size_t unit, int64_t first, int64_t count) const;
  // Their rows by decode_plan, (count, channels) in the codec's RoPE domain; what a plan adds of the layers below is
  // decoded with them.
  Matrix<float> decode_codes(size_t unit, int64_t first, int64_t count) const;
  int64_t slots(size_t unit) const;  // tokens that the unit holds as codes
  int64_t slot_begin(size_t unit) const;

  // What stands in for codes (CompressedCache::recall), or null.
  const RecalledPairs* recalled() const;

  bool any_evicted() const;  // by any head
  bool any_evicted(int layer, int head) const;
  bool evicted(int layer, int head, int64_t position) const;
  // Positions of the tokens that the head still sees, those of the open block included.
  std::vector<int32_t> seen(int layer, int head) const;

 private:
  size_t unit(int layer, int head, Role role, int tier = 0) const {
    return static_cast<size_t>(unit_of(layer, head, role, tier));
  }
  const CacheModel* model_;
  const CachePolicy* policy_;
  const SequenceMap* map_;
};

}  // namespace vqkv
