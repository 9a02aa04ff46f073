// How the tokens of a unit are coded, in one place: a sweep and a cache that replays the same tokens under the same
// policy call these, so the rows that a sweep measures are the rows that a replay attends to.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string>

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
  // Queries of tokens [0, out.rows / group) of a KV head's query heads, (n * group, head_dim), in the RoPE domain of
  // its keys. Asked only for a unit whose codec is fitted to them.
  virtual void queries(int kv_head, MutMatrix out) const = 0;
};

// The same of a unit in an older tier: load() gives what the tier before decodes to.
class AgedRows : public HeldRows {
 public:
  void lower(int64_t, MutMatrix) const final;  // kInternal: CodecSet refuses tiers of codecs that see one
  void queries(int, MutMatrix) const final;    // kInternal: nothing is fitted
  // Codes of tokens [from, to) in the tier before. Asked only for a level, which has the same units there.
  virtual CodeBlock codes(int64_t from, int64_t to) const = 0;
  virtual const CodeLayout& layout() const = 0;
};

// Tokens [from, to) of `codes`, whole blocks of `layout`.
CodeBlock codes_of(const CodeBlock& codes, const CodeLayout& layout, int64_t from, int64_t to);

// kUsage: a codec of this method fits parameters to each prompt and is one of several tiers.
[[noreturn]] void refuse_fitted_tier(const std::string& method);

// How many of the `held` tokens of a prompt its parameters are fitted on: CachePolicy::prompt where it is said, else
// those that are there when the first one is coded token by token, CachePolicy::waits at least. So blocks, steps, exact
// prompts and sweeps fit the same.
int64_t fit_tokens(const CachePolicy& policy, int64_t held);

// Why a codec of this method can't fit its parameters to the prompt that the policy says, which is too short, or "".
std::string prompt_conflict(const CachePolicy& policy, const std::string& method, const Codec& codec);

// The parameters that a unit fits on tokens [from, tokens); null for methods that have none. group: query heads of a KV
// head. from: CachePolicy::fitted_from; kInternal where it is not 0 and the codec is fitted to queries. kInternal for a
// codec that is fitted to fewer tokens than it asks for, or asks for none.
std::unique_ptr<SequenceState> fit_unit(const Codec& codec, const UnitShape& unit, int group, const HeldRows& rows,
                                        int64_t tokens, int64_t from);

// Codes of tokens [from, to), whole codec blocks. `plan` is the codec's under `state`; codes that it has no entry for
// are kInternal: table lookups trust what is stored.
CodeBlock encode_unit(const Codec& codec, const DecodePlan& plan, const UnitShape& unit, const HeldRows& rows,
                      int64_t from, int64_t to, const SequenceState* state);

// Codes of tokens [from, to), whole codec blocks, that pass into an older tier. A level cuts the codes of the tier
// before; any other codec codes what those decode to. Either way the text is not needed again.
CodeBlock age_unit(const Codec& codec, bool level, const DecodePlan& plan, const UnitShape& unit, const AgedRows& rows,
                   int64_t from, int64_t to);

}  // namespace vqkv
