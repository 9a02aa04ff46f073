// The model side of caches: plans, page layouts and tile decoders of a codec set. Immutable, made once and shared by
// all sequences; what one sequence fits to its prompt is its own (CodedForm again, counted in its ledger).
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "cache/policy.h"
#include "cache/tile_decoder.h"
#include "codec/codec_set.h"
#include "core/rope.h"

namespace vqkv {

// How the codes of one unit are laid out and decoded.
struct CodedForm {
  // Of `codec` under `query`. Units of one codec share a form: it says nothing of layers. model: the whole form without
  // a state, whose turned books serve here too.
  CodedForm(const Codec& codec, const UnitShape& unit, const PlanQuery& query,
            std::shared_ptr<const PageLayout> page_layout, const CodedForm* model = nullptr);
  DecodePlan plan;
  std::shared_ptr<const PageLayout> pages;
  std::vector<TurnedBooks> turned;
  std::vector<TileDecoder> decoders;  // one a head of the unit
  // Memory of this form alone: without pages, and without the books that it shares with `other`.
  int64_t bytes(const CodedForm& other) const;
};

class CacheModel {
 public:
  struct Unit {
    UnitShape shape;
    const Codec* codec = nullptr;
    std::shared_ptr<const CodedForm> form;
    std::shared_ptr<const CodedForm> draft;  // the same pages at the draft level; null without one
    int lower = -1;                          // CodecSet::lower_unit
    int tier = 0;                            // by age, the newest first
    bool level = false;                      // its codes are those of the tier before, cut
    // What it decodes are the rows themselves, keys after RoPE, so that exact rows can stand in their place.
    bool decodes_rows() const {
      return form->plan.rope == RopePlacement::kPost && lower < 0 &&
             std::ranges::none_of(form->decoders, &TileDecoder::folded);
    }
  };

  // draft_stages: what Visibility::kDraft reads, so many of the first stages of every codec (codec/level.h); 0:
  // nothing. kUsage where a codec has no such level, or fits parameters to each prompt.
  explicit CacheModel(std::shared_ptr<const CodecSet> codecs, int draft_stages = 0);
  // Of exact caches without codecs.
  explicit CacheModel(const CacheShape& shape);

  const CacheShape& shape() const { return shape_; }
  const CodecSet* codecs() const { return codecs_.get(); }
  const RopeTable& rope() const { return rope_; }
  const std::vector<Unit>& units() const { return units_; }
  int tiers() const { return codecs_ ? codecs_->tiers() : 1; }
  // CodecSet::newer_tokens.
  int64_t newer_tokens(int tier) const { return codecs_ ? codecs_->newer_tokens(tier) : 0; }
  // Unit of a head, or -1 without codecs.
  int unit_of(int layer, int head, Role role, int tier = 0) const {
    return unit_index_[static_cast<size_t>(
        (2 * (tier * shape_.layers + layer) + (role == Role::kValue)) * shape_.kv_heads + head)];
  }
  // Units of a layer and tier, both roles.
  std::span<const size_t> layer_units(int layer, int tier = 0) const {
    return layer_units_[static_cast<size_t>(tier * shape_.layers + layer)];
  }
  // Keys of a head are held after RoPE: their unit codes them so, or there is none.
  bool keys_post_rope(int layer, int head) const {
    const int u = unit_of(layer, head, Role::kKey);
    return u < 0 || units_[static_cast<size_t>(u)].form->plan.rope == RopePlacement::kPost;
  }
  bool drafts() const { return draft_level_ >= 0; }
  int draft_level() const { return draft_level_; }  // as PlanQuery::level
  bool sees_lower() const { return codecs_ && codecs_->sees_lower(); }
  // Some codec is fitted to queries of its prompt; some of this layer.
  bool fits_queries() const { return fits_queries_; }
  bool fits_queries(int layer) const;
  // Tokens of the shortest body that holds whole codec blocks of every unit of the role.
  int64_t block_tokens(Role role) const { return block_tokens_[static_cast<int>(role)]; }
  // CodecSet::constant_bytes, asked once.
  int64_t constant_bytes() const { return constant_bytes_; }
  // Refuses (kUsage) a policy whose flushes cut the blocks of a codec or its tiers, or that gives up tokens which a
  // layer above needs.
  void check(const CachePolicy& policy) const;

 private:
  CacheShape shape_;
  std::shared_ptr<const CodecSet> codecs_;
  RopeTable rope_;
  std::vector<int> unit_index_;  // (tier, layer, role, head)
  std::vector<Unit> units_;
  std::vector<std::vector<size_t>> layer_units_;  // (tier, layer)
  int64_t block_tokens_[2] = {1, 1};
  int64_t constant_bytes_ = 0;
  bool fits_queries_ = false;
  int draft_level_ = -1;
};

}  // namespace vqkv
