// Books of complex pairs (CommVQ): turned by 90 degrees as codewords, and as a sum over stages of Z_a + i Z_b reads
// them.
#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "codec/plan.h"
#include "core/view.h"

namespace vqkv {

// Books of complex pairs as a term that turns them by 90 degrees reads them.
struct TurnedBooks {
  std::shared_ptr<const AlignedVector<float>> books;
  int width = 0;
  std::shared_ptr<const AlignedVector<float>> words;
};
// i * Z of its codewords, from `turned` or as the newest there.
std::shared_ptr<const AlignedVector<float>> turned_books(const TableTerm& term, std::vector<TurnedBooks>& turned);

// Why rows of this plan are not sums of complex codewords alone, each taken once as it is and once turned by 90
// degrees; or nothing.
std::optional<std::string> pair_sum_reason(const DecodePlan& plan);

// Books of keys that are such sums: the pairs of one head, 16 at a time, x and y each a vector.
struct PairBooks {
  static constexpr int kPairs = 16;  // of a block
  static constexpr int kFloats = 2 * kPairs;

  // A stage of a block: which of the head's code slots are its codes a and b (TileDecoder::code_slots).
  struct Stage {
    int a = 0, b = 0;
    bool operator==(const Stage&) const = default;
  };
  // Pairs (p, p + head_dim / 2) of the head, p from 16 times its index on.
  struct Block {
    std::vector<Stage> stages;
    size_t words = 0;  // where its books begin: (stages, entries, [x 16, y 16])
  };

  // Of one head of the unit. Null where pair_sum_reason gives one, or its codewords' pairs are not those above.
  static std::shared_ptr<const PairBooks> of(const DecodePlan& plan, int head, int head_dim);

  // out (count, row_floats()): the sums of tokens by blocks, [x 16, y 16] each. codes: those of the head's code slots,
  // `code_stride` apart.
  void sum(const uint16_t* codes, int64_t code_stride, int64_t count, float* out) const;
  int64_t row_floats() const { return static_cast<int64_t>(blocks.size()) * kFloats; }  // of a token's sums
  int64_t held_bytes() const;

  int64_t entries = 0;
  std::vector<Block> blocks;
  // Zero where a codeword has no such pair. Codewords that are multiples of a common power of two, of which no sum over
  // stages leaves 16 bits, are kept as multiples of it alone: half as much to read, in sums that are exact.
  AlignedVector<float> words;
  AlignedVector<int16_t> multiples;
  float step = 0;  // of `multiples`

 private:
  void sum_multiples(const uint16_t* codes, int64_t code_stride, int64_t count, float* out) const;
};

}  // namespace vqkv
