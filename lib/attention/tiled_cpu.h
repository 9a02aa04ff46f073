// Parts shared by the tiled CPU backends: what a call sees of the cache, folded queries, partial softmax states.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "attention/attention.h"
#include "attention/backends_cpu.h"
#include "attention/scan_cpu.h"
#include "codec/query_form.h"
#include "core/per_thread.h"
#include "core/small_matrix.h"

namespace vqkv {

constexpr int64_t kTile = 128;  // tokens; K^T and V tiles of 32 KiB at head_dim 64 stay in L2
constexpr float kNegativeInfinity = -std::numeric_limits<float>::infinity();

// Rows that lie beside each other in tables and sums: as many as there are, up to a vector.
inline int64_t lanes_for(int64_t rows) { return rows == 1 ? 1 : rows <= 4 ? 4 : rows <= 8 ? 8 : 16; }
using kernels::padded;

// cos and sin of a tile's positions, transposed to (pair, token), shared by layers and heads.
class RotationTiles {
 public:
  void grow(const RopeTable& rope, int64_t tiles);  // not thread-safe
  // Rotates columns [from, to) of a K^T tile (channels x kTile) whose first column is position tile * kTile.
  void rotate(float* keys, int64_t tile, int64_t from, int64_t to) const;
  // The same where column t is at positions[t].
  void rotate(float* keys, const int32_t* positions, int64_t from, int64_t to) const;
  int64_t held_bytes() const;

 private:
  int64_t half_ = 0;
  std::vector<double> frequencies_;
  double factor_ = 1;
  std::vector<AlignedVector<float>> tiles_;  // (half, kTile) cos, then sin
};

// Columns of a tile for one role: [0, begin) seen by nobody; [begin, coded_begin) exact; [coded_begin, all_coded_end)
// coded for every query that sees the tile; [all_coded_end, any_coded_end) coded for the later queries and exact for
// the earlier; the rest exact. Of a policy that drops, "coded" tokens are gone.
struct RoleExtent {
  int64_t begin = 0, coded_begin = 0, all_coded_end = 0, any_coded_end = 0;
  bool dropped = false;
  bool any_coded() const { return !dropped && any_coded_end > coded_begin; }
};

class HeadQueries;
class CodeSums;

// The tokens that a head sees, in columns: token t is column t until a policy takes tokens out; then the others move
// together, and tiles are cut of what is left. Ends are by query, and exclusive.
struct HeadColumns {
  bool whole = true;                        // column = position
  int64_t sinks = 0, tokens = 0;            // columns
  std::vector<int64_t> seen, k_end, v_end;  // (queries): columns that the query sees; that are coded for it
  std::vector<int64_t> from;                // (queries): the first that it sees, in this segment
  std::vector<int32_t> position;            // (tokens), unless whole
  std::vector<int32_t> k_slot, v_slot;      // of columns from sinks on, as far as the cache holds codes; unless whole
  const std::vector<int64_t>& end(Role role) const { return role == Role::kKey ? k_end : v_end; }
  int64_t tiles() const { return (tokens + kTile - 1) / kTile; }
};

// One attend call on at most a block of queries. Row = query * group + query head within the group.
//
// Where codes have several tiers, a call is of one segment: the tokens whose keys are in one tier and whose values are
// in one, for each query those of its own position; exact tokens go with the newest tier, sinks with the oldest. Row by
// row the segments are what the query sees, without a token twice.
struct TiledCall {
  TiledCall(const CacheView& view, int layer, int64_t first, int64_t queries, RotationTiles& rotation, int key_tier = 0,
            int value_tier = 0);
  TiledCall(const TiledCall&) = delete;
  TiledCall& operator=(const TiledCall&) = delete;
  const HeadColumns& columns(int head) const { return own.empty() ? all : own[static_cast<size_t>(head)]; }
  RoleExtent extent(int head, Role role, int64_t begin, int64_t count) const;
  // Columns of a tile that a row's query sees.
  int64_t seen(int head, int64_t row, int64_t begin, int64_t count) const {
    return std::min(count, columns(head).seen[static_cast<size_t>(row / group)] - begin);
  }
  // The first row that sees column `begin`.
  int64_t first_row(int head, int64_t begin) const;
  // Columns [first, end) of a tile that a row sees through its codes (gone, of a policy that drops).
  std::pair<int64_t, int64_t> coded_keys(int head, int64_t row, int64_t begin, int64_t count) const {
    const HeadColumns& c = columns(head);
    const int64_t end = std::clamp<int64_t>(c.k_end[static_cast<size_t>(row / group)] - begin, 0, count);
    return {std::clamp<int64_t>(c.sinks - begin, 0, end), end};
  }
  // Columns of [begin, end) whose coded values a row sees.
  int64_t coded_values(int head, int64_t row, int64_t begin, int64_t end) const {
    const HeadColumns& c = columns(head);
    const auto query = static_cast<size_t>(row / group);
    return std::min({c.v_end[query], c.seen[query], end}) - std::max({c.sinks, c.from[query], begin});
  }
  bool empty() const;  // no query sees anything here
  int tier(Role role) const { return role == Role::kKey ? key_tier : value_tier; }
  // Of a head whose codes are attended to.
  const TileDecoder& decoder(int head, Role role) const { return cache.decoder(layer, head, role, tier(role)); }
  CodedBody body(int head, Role role) const { return cache.body(layer, head, role, tier(role)); }
  bool drops() const { return cache.policy().drops; }
  // Unit of a head whose codes are attended to, or -1.
  int coded_unit(int head, Role role) const { return drops() ? -1 : cache.unit_of(layer, head, role, tier(role)); }
  const ScoreMap& score_map(int head) const;
  CodedQueries coded_queries(int head) const;  // of a head whose codes are attended to
  // Columns of a tile, as the view and the decoder give tokens: exact rows; codes of the columns from `first` on,
  // counted after the sinks.
  void load_exact(int head, Role role, int64_t first, int64_t count, float* out, int64_t stride) const;
  void decode(int head, Role role, int64_t first, int64_t count, float* out, int64_t stride) const;
  // What plans add of the layers below.
  void add_lower(int head, Role role, int64_t first, int64_t count, float* out, int64_t stride) const;
  void token_scale(int head, Role role, int64_t first, int64_t count, float* out) const;
  void codes(int head, Role role, int64_t first, int64_t count, uint16_t* out, int64_t stride) const;
  void rotate(int head, float* keys, int64_t begin, int64_t from, int64_t to) const {
    const HeadColumns& c = columns(head);
    if (c.whole)
      rotation->rotate(keys, begin / kTile, from, to);
    else
      rotation->rotate(keys, c.position.data() + begin, from, to);
  }

  CacheView cache;
  const RotationTiles* rotation = nullptr;
  const HeadQueries* heads = nullptr;
  int layer = 0;
  int key_tier = 0, value_tier = 0;
  int64_t first = 0, queries = 0;  // first position, queries
  int64_t d = 0, width = 0;        // head_dim, and padded
  int64_t group = 0, rows = 0;
  int64_t tiles = 0;  // of the head that has most
  HeadColumns all;    // of heads that see everything

 private:
  // body(slot, n, at): runs of columns whose codes lie in slots side by side.
  template <class Body>
  void for_runs(int head, Role role, int64_t first, int64_t count, Body&& body) const;
  std::vector<HeadColumns> own;  // (heads) where one has lost tokens, else empty
};

// Lowest and highest coded logit of each row within one chunk.
struct ScoreRange {
  std::vector<float> low, high;
  int64_t held_bytes() const { return capacity_bytes(low) + capacity_bytes(high); }
  void add(int64_t row, const float* line, int64_t begin, int64_t end);
};

// Scaled queries of one KV head, and what folds the map of its key codec into them.
class HeadQueries {
 public:
  void prepare(const TiledCall& call, int head, ConstMatrix q, KeyScan scan);
  // line = (line + q.inner) * scale + q.outer on columns [begin, end); scale is indexed by column, or ignored.
  void unfold_scores(int64_t row, const float* scale, int64_t begin, int64_t end, float* line) const;
  void set_score_map(const TiledCall& call, const ScoreMap& map, const std::vector<ScoreRange>& ranges, int64_t chunks,
                     int64_t kv_heads, int head);
  void map_scores(int64_t row, int64_t begin, int64_t end, float* line) const;
  int64_t held_bytes() const;

  AlignedVector<float> x;  // (rows, d)
  AlignedVector<float> y;  // (rows, y_stride): x * map^T, when folded
  int64_t y_width = 0, y_stride = 0;
  std::vector<float> inner, outer;  // (rows): q . bias
  bool token_scale = false;
  // Table scoring: lut (rows, slots, lut_stride) = every codeword against the query, and its fixed-point form by row.
  AlignedVector<float> lut;
  int64_t slots = 0, lut_stride = 0;
  // Both by row. Empty where fp32 tables are faster or books longer than a byte; bytes also without kBytes.
  std::vector<scan::FixedTables> fixed;
  std::vector<scan::ByteTables> bytes;
  // lut once more with `lanes` rows beside each other: (groups of rows, slots, lut_stride, lanes). Empty where no row
  // can need fp32.
  AlignedVector<float> beside;
  int64_t lanes = 0;

 private:
  void build_tables(const TiledCall& call, const TileDecoder& decoder, KeyScan scan);
  std::vector<float> from_, to_, factor_;  // (rows) of the score map; empty without one
};

// What one thread does at a time: rows of one KV head against consecutive tiles.
struct Piece {
  int head = 0;
  int64_t tile_begin = 0, tile_end = 0, row_begin = 0, row_end = 0;
  bool by_code = false;  // values are summed by code
  size_t segment = 0;    // the call that it is of
  int64_t rows() const { return row_end - row_begin; }
};

// Softmax states of the rows of one piece. Rows are those of the call, also inside.
struct Partial {
  // sums: of a piece that sums by code, else null; used until unfold().
  void reset(const TiledCall& call, const Piece& piece, CodeSums* sums);
  // Turns a row's logits (columns padded with -inf) into probabilities relative to the running maximum; [begin, end)
  // are coded.
  void absorb(int64_t row, float* line, int64_t columns, int64_t begin, int64_t end);
  // Values in their own domain: notes the mass on coded columns and multiplies it by the token scale.
  void weigh(int64_t row, float* line, int64_t begin, int64_t end, const float* scale);
  // Adds the sums of the code domain to `out`: once a piece.
  void unfold(const TiledCall& call);
  size_t at(int64_t row) const { return static_cast<size_t>(row - piece.row_begin); }
  float* out_row(int64_t row) { return out.data() + (row - piece.row_begin) * width; }
  int64_t held_bytes() const;
  float* y_row(int64_t row) { return y.data() + (row - piece.row_begin) * y_stride; }

  Piece piece;
  AlignedVector<float> top, sum, coded, out;  // (rows), (rows), (rows), (rows, width)
  AlignedVector<float> y, mass, scaled;       // values in their own domain: (rows, y_stride), (rows), (rows)
  int64_t width = 0, y_width = 0, y_stride = 0;
  bool own_domain = false, token_scale = false;
  CodeSums* sums = nullptr;
};

// Of a vector of things that hold vectors.
template <class V>
int64_t held_in(const V& all) {
  int64_t bytes = capacity_bytes(all);
  for (const auto& each : all) bytes += each.held_bytes();
  return bytes;
}

// What turns a row's logits into probabilities: exp(logit - top) / sum. (kv_heads * rows)
struct RowState {
  float top = 0, sum = 0;
};
using RowStates = std::vector<RowState>;

// out = softmax-weighted sums over all pieces, in their order; NaN for a row with a logit that is NaN, or without any.
// stats and states may be null.
void merge_partials(const TiledCall& call, const std::vector<Partial>& partials, size_t pieces, MutMatrix out,
                    AttendStats* stats, RowStates* states);

}  // namespace vqkv
