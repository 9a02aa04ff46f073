// DecodePlan: how any backend decodes a codec's blocks without knowing the codec. A small value, the seam between
// methods and kernels. Backends implement term families, never methods.
//
//   y[j]  = sum of the terms' contributions to code channel j                 (code_channels)
//   x     = outer_bias + s * (inner_bias + y * map)                           (channels), s = token scale or 1
//   x     = overlay(x), and the row of the layer below added where the plan adds_lower;   post-RoPE key = rope == kPre
//   ? rotate(x, position) : x
//
// A query folds once a step where the key is stored post-RoPE: q.x = q.outer_bias + s * (q.inner_bias + (map q).y); a
// value output unfolds once: sum p x = P outer_bias + (sum p s) inner_bias + (sum p s y) map.
#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <variant>
#include <vector>

#include "codec/code_block.h"
#include "codec/linear_map.h"
#include "core/view.h"

namespace vqkv {

enum class RopePlacement { kPost, kPre };  // keys coded after or before RoPE; values are always kPost

// y[channels[slot][i]] += codewords[book_of_slot[slot]][code][i] for every slot: product, residual, grouped residual,
// additive. Two slots may cover the same channels (residual stages) and share a book (Kumar's groups).
struct TableTerm {
  int field = 0;       // index into CodeLayout::fields, per-token
  int first_slot = 0;  // slots [first_slot, first_slot + slots) of that field
  int slots = 0;
  int entries = 0;  // codewords a book
  int width = 0;    // channels a codeword covers
  int books = 0;
  std::shared_ptr<const AlignedVector<float>> codewords;  // (books, entries, width), values exact in stored_as
  DType stored_as = DType::kF16;                          // how a deployment keeps them: what the ledger counts
  std::vector<int32_t> book_of_slot;                      // (slots)
  std::vector<int32_t> channel;                           // (slots, width): code channel of each codeword element
  // rotate90: the codeword acts as i*Z on (x, y) pairs stored as [x..., y...] of its width (CommVQ's second code).
  enum class Op { kIdentity, kRotate90 } op = Op::kIdentity;
  bool disjoint = false;  // no code channel is covered by two slots (a product code)
};

// y[j] += scale * level(code) + zero for a scalar field with one slot a code channel, or scale * (level(code) + zero)
// where the zero is in units of codes.
struct LevelsTerm {
  int field = 0;              // per-token field with code_channels slots
  std::vector<float> levels;  // empty: level(code) = code - offset
  float offset = 0;
  // The metadata groups: scale and zero are side arrays. Group of (token t, channel j): per-token sides are indexed by
  // channel / group_channels; per-block sides by (token within block / group_tokens) * channel_groups + channel /
  // group_channels.
  int scale_side = -1;  // -1: 1
  int zero_side = -1;   // -1: 0
  int group_channels = 1;
  int group_tokens = 1;
  // Groups of another form, of per-block sides: (block_tokens, code_channels), the slot of each value's group. The two
  // numbers above are not read then. Null: there are none.
  std::shared_ptr<const std::vector<int32_t>> group_of;
  bool zero_of_codes = false;
};

// y = side values themselves (exact channels).
struct DenseTerm {
  int side = 0;                  // per-token side with `channel.size()` slots
  std::vector<int32_t> channel;  // code channel of each slot
};

// y[r * width + i] += factor * scale * sum of sign * projection[row][i] over the rows, for each run r of `width` code
// channels: projections of which the signs alone are kept (QJL, the second stage of TurboQuant), or rows that bits
// choose (CommVQ's values, with half the sum of all rows as a bias).
struct SignTerm {
  // Per-token, 8 bits, slots() a run: row 8 n + b is bit b of slot n, lowest first; a set bit is +1, another -1.
  int field = 0;
  int rows = 0, width = 0;
  std::shared_ptr<const AlignedVector<float>> projection;  // (rows or more, width), values exact in stored_as
  DType stored_as = DType::kF32;                           // how a deployment keeps it: what the ledger counts
  float factor = 1;
  int scale_side = -1;  // per-token side with one slot a run; -1: 1
  // Outlier channels, which each block names for each run: a per-block field of their numbers within the run, equally
  // many a run. -1: there are none.
  int outlier_field = -1;
  enum class Reach { kAll, kOutliers, kOthers } reach = Reach::kAll;  // channels that the sum is added to
  int slots() const { return (rows + 7) / 8; }
};

using PlanTerm = std::variant<TableTerm, LevelsTerm, DenseTerm, SignTerm>;

// Adjusts logits of the coded segment, per query (CalibQuant's range map; mass corrections). Applied before softmax.
struct ScoreMap {
  enum class Kind { kNone, kRange } kind = Kind::kNone;
  float low_shift = 0;  // kRange: [min, max] of the segment maps linearly to [min + low_shift, max - high_shift]
  float high_shift = 0;
};

// How queries are held where they meet coded keys. kQ8: rounded to blocks of 32 channels of a head with a float16
// scale, in the code domain (CodedQueries in codec/query_form.h), as llama.cpp's CPU path does. Exact keys meet exact
// queries.
enum class QueryForm : uint8_t { kExact, kQ8 };

// Books and projections that were counted, kept alive: an address names no other meanwhile.
using CountedBooks = std::set<std::shared_ptr<const void>>;

struct DecodePlan {
  int channels = 0;       // of the unit
  int code_channels = 0;  // of the coded domain (== channels unless the map changes the dimension)
  CodeLayout layout;
  std::vector<PlanTerm> terms;
  LinearMap map;                  // (code_channels, channels)
  std::vector<float> inner_bias;  // (channels) or empty
  std::vector<float> outer_bias;  // (channels) or empty
  // Token scale: a per-token side with 1 slot (whole unit) or one slot a scale group of channels/slots channels each.
  int token_scale_side = -1;
  RopePlacement rope = RopePlacement::kPost;
  ScoreMap score;
  // Not kExact only of keys after RoPE behind nothing but one Hadamard map with signs: there is no other rotation in
  // llama.cpp, and behind an orthonormal map what a query is in the domain of keys has one answer.
  QueryForm query = QueryForm::kExact;
  // How a deployment keeps levels, map and biases, whose values are exact in it: what the ledger counts.
  DType constants_as = DType::kF32;
  // Codes are what the row of the same token, heads and role one layer below (CodecSet::lower_unit), as decoded there,
  // leaves over. Nothing is added in layer 0.
  bool adds_lower = false;

  bool table_only() const;  // every term is a TableTerm
  // Books, projections, map and biases as stored: model-side constants of this unit, without the books in `counted`,
  // which those of this plan join.
  int64_t constant_bytes(CountedBooks& counted) const;
};

// Throws kInternal where a plan contradicts itself (sizes, field and side indices, channels out of range).
void check_plan(const DecodePlan& plan);

// The reference decoder: x (tokens, channels) in the codec's RoPE domain. Plain scalar code, judged by nothing else.
// lower: rows of the layer below, (tokens, channels), read where the plan adds_lower; empty in layer 0.
void decode_plan(const DecodePlan& plan, const CodeBlock& block, MutMatrix x, ConstMatrix lower = {});

}  // namespace vqkv
