// Keys and values of one term of levels (LevelsTerm), attended where their codes lie: with y = scale * level + zero,
//   q . y = q . zero + (q scale) . levels,   sum p y = sum p zero + sum (p scale) levels,
// where scale and zero are those of a group of tokens or of channels. No tile is decoded (packed_levels_cpu.h).
#pragma once
#include <cstdint>
#include <optional>
#include <string>

#include "attention/tile_parts_cpu.h"

namespace vqkv {

// Why codes of this plan, of which `term` is one, can't be attended so, as far as its terms tell; or nothing.
std::optional<std::string> packed_levels_reason(const DecodePlan& plan, const LevelsTerm& term);

// Logits of the rows of a piece against the slots [low, high) of coded keys, into s.table_scores; column 0 of those is
// column `origin` of the head. Where the head has lost tokens, keys are decoded for it: their groups lie apart.
void score_level_chunk(const TiledCall& call, const Piece& piece, int64_t origin, int64_t low, int64_t high,
                       TileScratch& s);

// y (rows, y_stride) += p * values of columns [from, end) of the tile that begins with column `begin`, in the code
// domain; p (rows, kTile). Of a head that sees all of its tokens.
void sum_level_tile(const TiledCall& call, int head, int64_t begin, int64_t from, int64_t end, const float* p,
                    int64_t rows, float* y, int64_t y_stride);

// Before the first sum_level_tile of a piece: the cache may have changed since this thread last read it.
void forget_levels();

int64_t level_scratch_bytes();  // that threads keep; while none works

}  // namespace vqkv
