// What the tiers of a codec set make of a window's rows, as a cache that replays the window does.
#pragma once
#include <functional>
#include <span>
#include <vector>

#include "experiment/coded_rows.h"

namespace vqkv {

// A window's coded tokens in one unit, from the sinks on: codes, and what they decode to in the codec's RoPE domain.
struct CodedUnit {
  const CodeBlock* block = nullptr;
  const Matrix<float>* rows = nullptr;
};

// Passes what is old enough at the window's end into `unit` of an older tier, from what `newer(unit)`, any unit of the
// tier before, left. `block` and `decoded` are what it leaves itself; of `heads` it fills older_k or older_v.
CodingTotals code_older_unit(const TraceRows& rows, const CodecSet& codecs, size_t unit, const EvalWindow& w,
                             std::span<HeadRows> heads, const std::function<CodedUnit(size_t)>& newer, CodeBlock& block,
                             Matrix<float>& decoded);

// Where the older tiers end for the query at `position`, by tier from 1 on; empty for one tier. Or, where `total`
// tokens are there and no query looks, what the next one would see.
std::vector<int64_t> older_ends(const CodecSet& codecs, const CachePolicy& policy, Role role, int64_t position);
std::vector<int64_t> older_ends_among(const CodecSet& codecs, const CachePolicy& policy, Role role, int64_t total);

// `newest` with the rows from `sinks` on up to ends[i] of the older tiers' forms in their place.
Matrix<float> rows_by_age(ConstMatrix newest, std::span<const Matrix<float>> older, std::span<const int64_t> ends,
                          int64_t sinks);

// How many of the coded tokens of a role lie in each tier while `total` tokens are there.
std::vector<int64_t> tokens_by_tier(const CodecSet& codecs, const CachePolicy& policy, Role role, int64_t total);

}  // namespace vqkv
