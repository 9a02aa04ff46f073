// How the tokens of a unit are coded, in one place: a sweep and a cache that replays the same tokens under the same
// policy call these, so the rows that a sweep measures are the rows that a replay attends to.
#pragma once
#include <cstdint>
#include <memory>
#include <span>

#include "cache/policy.h"
#include "codec/codec.h"
#include "core/view.h"

namespace vqkv {

// What the coder of one unit sees of its sequence, as a cache holds it.
class HeldRows {
 public:
  virtual ~HeldRows() = default;
  // Tokens [first, first + out.rows) of a KV head, (n, head_dim), rounded to the cache's exact_dtype. Keys stand in the
  // RoPE domain that their own unit codes in, whatever unit asks. Thread-safe.
  virtual void load(Role role, int kv_head, int64_t first, MutMatrix out) const = 0;
  // Positions of tokens [first, first + out.size()) in their text.
  virtual void positions(int64_t first, std::span<int32_t> out) const = 0;
  // Coded tokens [first, first + out.rows) as the unit's CodecSet::lower_unit decodes them, (n, channels). Asked only
  // where there is one.
  virtual void lower(int64_t first, MutMatrix out) const = 0;
};

// How many of the `held` tokens of a prompt its parameters are fitted on: those that are there when its first token is
// coded token by token, so that block and step replay fit the same. For a prompt that is whole before anything is coded
// that is `held` itself.
int64_t fit_tokens(const CachePolicy& policy, int64_t held);

// The parameters that a unit fits on the first `tokens` tokens; null for methods that have none.
std::unique_ptr<SequenceState> fit_unit(const Codec& codec, const UnitShape& unit, const HeldRows& rows,
                                        int64_t tokens);

// Codes of tokens [from, to), whole codec blocks. `plan` is the codec's under `state`; codes that it has no entry for
// are kInternal: table lookups trust what is stored.
CodeBlock encode_unit(const Codec& codec, const DecodePlan& plan, const UnitShape& unit, const HeldRows& rows,
                      int64_t from, int64_t to, const SequenceState* state);

}  // namespace vqkv
