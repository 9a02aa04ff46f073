// Parts of the tiled backends: keys are scored and values summed apart, each in the mode that it is given; the loop
// over tiles (tiled_backend_cpu.cpp) joins them.
#pragma once
#include <cstdint>
#include <vector>

#include "attention/code_sums_cpu.h"
#include "attention/tiled_cpu.h"

namespace vqkv {

constexpr int64_t kChunkTiles = 2;  // tiles a partial state: pieces for every thread already at 1k tokens
constexpr int64_t kRowBatch = 24;   // rows scored at once: 12 KiB of scores stay in L1

// What a thread works in; grown, never shrunk.
struct TileScratch {
  AlignedVector<float> keys, other_keys, values, other_values, scores, other_scores, scale, table_scores, run_scores,
      run_scale, weights, wide_sums, wide_scores, pair_sums, pair_queries, pair_phases;
  std::vector<uint8_t> codes;
  std::vector<uint16_t> wide_codes, value_codes;
  std::vector<float> loudest;
  CodeSums sums;
  int64_t held_bytes() const;
};

inline float* ensure_floats(AlignedVector<float>& v, int64_t n) {
  if (static_cast<int64_t>(v.size()) < n) v.assign(static_cast<size_t>(n), 0.0f);
  return v.data();
}

// Both forms of the tokens of one tile for one role: the main form holds what all queries see alike, the other form the
// codes of tokens that only the later queries see coded, or all codes when they are decoded in their own domain.
struct TileForms {
  float* main = nullptr;
  float* other = nullptr;
  int64_t other_begin = 0, other_end = 0;  // columns (tokens within the tile) that `other` holds
  bool folded = false;
  bool table = false;  // logits of coded keys lie in TileScratch::table_scores
};

// ---- Keys (tile_keys_cpu.cpp) --------------------------------------------------------------------------------------

// Logits of the coded tokens of tiles [tile_begin, tile_end), by rows of chunk length, into s.table_scores.
void scan_key_chunk(const TiledCall& call, const Piece& piece, int64_t tile_begin, int64_t tile_end, TileScratch& s);
// The same for keys that are complex sums, of coded tokens [low, high) in the chunk that begins with column `origin`
// (tile_pairs_cpu.cpp).
void scan_pair_chunk(const TiledCall& call, const Piece& piece, int64_t origin, int64_t low, int64_t high,
                     TileScratch& s);
// The K tile of one head, transposed (channels x kTile), and its token scale where codes stay in their own domain.
TileForms load_key_tile(const TiledCall& call, int head, KeyScan mode, int64_t begin, int64_t count, TileScratch& s);
// Logits of `batch` rows against a tile, each token in the form that the row's query sees; -inf where it sees
// nothing. s.table_scores begins with row `row_begin`.
void score_tile(const TiledCall& call, int head, const TileForms& k, int64_t begin, int64_t count, int64_t row,
                int64_t batch, int64_t row_begin, TileScratch& s);

// ---- Values (tile_values_cpu.cpp) ----------------------------------------------------------------------------------

// The V tile of one head. by_code: the codes of what is coded, to be summed; levels
// are summed where they lie (level_tiles_cpu.h).
TileForms load_value_tile(const TiledCall& call, int head, bool by_code, int64_t begin, int64_t count, TileScratch& s);
// out += p * v, in token order whatever the forms, but for sums by code.
void sum_tile(const TiledCall& call, const TileForms& v, Partial& p, int64_t begin, int64_t count, int64_t row,
              int64_t batch, TileScratch& s);

}  // namespace vqkv
