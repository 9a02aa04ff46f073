// Codes of one head of one unit brought to fp32, a tile at a time: what every CPU backend decodes with. Prepared once
// from the plan; reads pages where they lie.
#pragma once
#include <cstdint>
#include <memory>
#include <set>
#include <span>
#include <vector>

#include "cache/head_map.h"
#include "cache/layout.h"
#include "cache/pair_books.h"
#include "codec/codec.h"
#include "core/view.h"

namespace vqkv {

struct UnitMap;

// The codes of one unit of one sequence, where they lie.
class CodedBody {
 public:
  CodedBody(const UnitMap& unit, int64_t slot_end) : unit_(&unit), slot_end_(slot_end) {}
  const std::byte* page(int64_t index) const;
  // The exact exceptions of a slot below slot_end; `pages` has an overlay.
  std::span<const StoredOverlay> exceptions(const PageLayout& pages, int64_t slot) const;
  // How many of those that are held come before the slot's; slot_end: all.
  int64_t exceptions_before(const PageLayout& pages, int64_t slot) const;

 private:
  const UnitMap* unit_;
  int64_t slot_end_;
};

class TileDecoder {
 public:
  TileDecoder() = default;
  // `head` counts within the unit. turned: what decoders beside this one have turned, with what it adds.
  TileDecoder(const DecodePlan& plan, std::shared_ptr<const PageLayout> pages, Role role, int head, int head_dim,
              std::vector<TurnedBooks>& turned);

  // Folded: decode gives y of the code domain, and the caller applies x = outer + s * (inner + y * map) to queries or
  // sums. Otherwise decode gives x itself. Folded when the map moves channels and nothing has to be done to x by token
  // (no RoPE, no overlay, one scale a head, nothing of the layer below): one product a query instead of one a token.
  // Keys whose queries are rounded (DecodePlan::query) are folded, map or not.
  bool folded() const { return folded_; }
  int64_t width() const { return folded_ ? code_width_ : head_dim_; }  // channels that decode gives
  int64_t code_width() const { return code_width_; }
  const HeadMap& map() const { return map_; }                      // (code_width, head_dim)
  const std::vector<float>& inner_bias() const { return inner_; }  // (head_dim) or empty
  const std::vector<float>& outer_bias() const { return outer_; }
  bool has_token_scale() const { return scale_side_ >= 0; }

  // Slots [first, first + count) of the coded body, count <= 128. Keys: out[channel * stride + i]; values:
  // out[i * stride + channel], where columns up to the padded width may be written.
  void keys(const CodedBody& body, int64_t first, int64_t count, float* out, int64_t stride) const;
  void values(const CodedBody& body, int64_t first, int64_t count, float* out, int64_t stride) const;
  // x itself as rows, folded or not: what a layer above adds to its own.
  void rows(const CodedBody& body, int64_t first, int64_t count, float* out, int64_t stride) const;
  // The token scale of this head; where has_token_scale(), and one for the whole head alone.
  void token_scale(const CodedBody& body, int64_t first, int64_t count, float* out) const;
  // out[i * stride + t]: the code of code_slots()[i].
  void codes(const CodedBody& body, int64_t first, int64_t count, uint16_t* out, int64_t stride) const;

  // A table slot as this head sees it.
  struct Slot {
    int field = 0, slot = 0;       // of the layout
    int entries = 0, stride = 0;   // codewords and floats from one to the next
    const float* words = nullptr;  // first element of codeword 0 that lands in this head
    int begin = 0;                 // first channel, when contiguous
    int width = 0;                 // channels it gives
    bool contiguous = true;
    bool store = false;                     // nothing was written to these channels before
    std::vector<int32_t> element, channel;  // when not contiguous
  };
  const std::vector<Slot>& slots() const { return slots_; }
  // A run of a sign term, or what of it lands in this head.
  struct Signs {
    SignTerm term;
    int run = 0, outliers = 0;     // which one of the unit, and how many outlier channels a block names in it
    int from = 0;                  // its first channel that this head has
    int channel = 0, width = 0;    // where that is in the head, and how many there are
    const float* words = nullptr;  // (rows, stride): the projection from that channel on, in whole vectors
    int64_t stride = 0;
  };
  const std::vector<Signs>& signs() const { return signs_; }
  // Codes that a scan reads: those of slots(), then the bytes of signs().
  struct CodeSlot {
    int field = 0, slot = 0;  // of the layout
    int entries = 0;
  };
  const std::vector<CodeSlot>& code_slots() const { return code_slots_; }
  // Keys before RoPE that are sums of complex codewords: how such sums read the books; else null.
  const PairBooks* pairs() const { return pairs_.get(); }
  // Of a plan whose only term is one of levels: that term, or null. Code channel c of this head is slot level_slot() +
  // c of its field.
  const LevelsTerm* only_levels() const { return only_levels_ ? &levels_[0].term : nullptr; }
  int level_slot() const { return levels_[0].slot; }
  const PageLayout& pages() const { return *pages_; }
  // Memory behind this object; books in `shared` apart, others join it.
  int64_t bytes(std::set<const void*>& shared) const;

 private:
  struct Levels {
    int field = 0, channel = 0, slot = 0;  // slot: code channel in the unit
    LevelsTerm term;
    bool store = false;
  };
  struct Dense {
    int side = 0, slot = 0, channel = 0;
    bool store = false;
  };
  void decode(const CodedBody& body, int64_t first, int64_t count, bool transposed, float* out, int64_t stride) const;
  void decode_tables(const std::byte* page, int64_t first, int64_t count, float* rows, int64_t stride) const;
  void decode_pairs(const std::byte* page, int64_t first, int64_t count, float* rows, int64_t stride) const;
  void decode_columns(const std::byte* page, int64_t first, int64_t count, float* columns, int64_t stride) const;
  void add_signs(const Signs& signs, const std::byte* page, int64_t first, int64_t count, float* rows,
                 int64_t stride) const;
  // Which of `signs`' channels a block adds to: 1 or 0 each, (width).
  void find_reach(const Signs& signs, const std::byte* page, int64_t block, float* reach) const;
  void apply_overlay(const CodedBody& body, int64_t first, int64_t count, bool transposed, float* out,
                     int64_t stride) const;

  std::shared_ptr<const PageLayout> pages_;
  int head_dim_ = 0;
  int64_t low_ = 0;  // first channel of this head in the unit
  int64_t code_width_ = 0;
  bool folded_ = false, overlay_ = false, only_levels_ = false;
  bool zero_rows_ = false, zero_columns_ = false;  // some channels are written by nobody
  std::vector<Slot> slots_;
  std::vector<Levels> levels_;
  std::vector<Dense> dense_;
  std::vector<Signs> signs_;
  std::vector<CodeSlot> code_slots_;
  std::shared_ptr<const PairBooks> pairs_;
  std::vector<std::shared_ptr<const AlignedVector<float>>> books_;  // keeps `words` alive
  HeadMap map_;
  std::vector<float> inner_, outer_;
  int scale_side_ = -1, scale_slot_ = 0;
  int scale_slots_ = 0, scale_width_ = 0;  // scale groups inside this head, when more than one
};

// What all threads keep to decode in, a tile or so each; while none decodes.
int64_t tile_decoder_scratch_bytes();

}  // namespace vqkv
