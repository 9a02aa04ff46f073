// Values without decoding them: the probabilities of the tokens that share a codeword are added up, slot by slot, and
// the sums meet the codebook once at the end of a segment of tokens.
//
// Rows lie beside each other (slot, codeword, row), so a code is read once and one vector add serves all query heads of
// a group. With one sum a row and slot the same work is an add for each of them.
#pragma once
#include <cstdint>
#include <optional>

#include "attention/backends_cpu.h"
#include "cache/tile_decoder.h"
#include "core/per_thread.h"
#include "core/view.h"

namespace vqkv {

// Segments are cut at absolute positions. In each, a row sums by code if it sees at least `least` coded tokens there:
// a rule of the row's own position, so a block of queries gives the bits of single steps.
struct ValueRule {
  int64_t segment = 0;  // tokens, a multiple of kTile; 0: never
  int64_t least = 0;
};
ValueRule value_rule(const DecodePlan& plan, const TileDecoder& decoder, int64_t group, ValueSums when);

// Rows that one segment sums together at most: as many as keep the sums in the second-level cache.
int64_t summed_rows(const TileDecoder& decoder);

// The sums of up to summed_rows() rows.
class CodeSums {
 public:
  void reset(const TileDecoder& decoder, int64_t rows);
  // Rows that one add serves: [row / lanes() * lanes(), ...).
  int64_t lanes() const { return lanes_; }
  // Adds weights (count, lanes) of rows [row, row + lanes()), zero past those that exist; codes (slots, stride). `row`
  // may lie inside a group of lanes when the lanes that reach into the next carry zeros.
  void add(int64_t row, const float* weights, int64_t count, const uint16_t* codes, int64_t stride);
  void scale(int64_t row, float f);
  // y (rows, rounded up to whole groups of lanes(), y_stride) += sums * codewords; of signs, the sums of each bit times
  // its row of the projection. Once: what was summed is gone.
  void unfold(float* y, int64_t y_stride);
  int64_t held_bytes() const { return capacity_bytes(sums_); }

 private:
  const TileDecoder* decoder_ = nullptr;
  int64_t rows_ = 0, lanes_ = 0, slots_ = 0, entries_ = 0;
  AlignedVector<float> sums_;  // (groups, slots, entries, lanes), and lanes of padding
};

}  // namespace vqkv
