// A unit's channels in disjoint sets, branches, each coded by a codec of its own.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "codec/codec.h"

namespace vqkv {

struct Branch {
  std::string name;              // "low": its fields are low_code, its parameters low/codewords
  std::vector<int32_t> channel;  // of the unit, ascending: what its codec sees as channels 0, 1, ...
  // Codes tokens one by one, without side scalars, by tables alone.
  std::unique_ptr<Codec> codec;
};

// The branches' fields one behind the other, and their terms over the unit's channels. They are trained one by one,
// each with a random stream of its own. A level holds as many stages of each branch, or all of one that has no more.
// The branches' channels together are all of the unit's, each once (kInternal).
std::unique_ptr<Codec> make_branches(std::vector<Branch> branches, RopePlacement rope);

// Channels of the unit whose pair of RoPE takes more than `period` tokens for a turn, and all that don't rotate (slow),
// or the others; ascending. No channel rotates where the unit has no frequencies.
std::vector<int32_t> channels_by_period(const UnitShape& unit, int64_t period, bool slow);

}  // namespace vqkv
