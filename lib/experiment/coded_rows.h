// One unit of one window, coded as a cache that replays the window codes it: exact and decoded rows side by side.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "codec/codec_set.h"
#include "codec/query_form.h"
#include "experiment/trace_rows.h"

namespace vqkv {

// Everything of one (window, KV head) of a layer; keys after RoPE, rows as in FidelitySample.
struct HeadRows {
  Matrix<float> k, v, k_hat, v_hat;
  const CodeBlock* key_block = nullptr;  // on the first head of a unit
  const CodeBlock* value_block = nullptr;
  int64_t coded_k = 0, coded_v = 0;
  ScoreMap score;                               // of coded keys
  CodedQueries query;                           // that meet them
  std::vector<Matrix<float>> older_k, older_v;  // (tiers - 1): what k_hat and v_hat become with age, as far as they do
};
// The RoPE domain in which a cache holds the exact keys of a head.
RopePlacement held_rope(const CodecSet& codecs, int layer, int head);
// k and v, as recorded. kBadData, with the place, for what a cache that replays the window could not hold: sinks,
// window and tail enter it in exact_dtype whether they are coded later or not, keys in the RoPE domain `held`.
HeadRows exact_rows(const TraceRows& rows, int layer, int head, const EvalWindow& w,
                    RopePlacement held = RopePlacement::kPost);

struct CodingTotals {
  double encode = 0, decode = 0;  // seconds
  int64_t values = 0;
  int64_t tokens = 0, exceptions = 0;       // coded, and their exact exceptions
  int64_t state_bytes = 0, form_bytes = 0;  // fitted to the window
  CodingTotals& operator+=(const CodingTotals& other);
};
// Codes one unit of one window as a cache does (cache/coding.h); `heads` are those of its layer, whose k_hat or v_hat
// it fills. lower: what CodecSet::lower_unit left in its own `keep`, the coded rows in the codec's RoPE domain.
// keep_state: what the unit fitted to the window, or null.
CodingTotals code_unit(const TraceRows& rows, const CodecSet& codecs, const TrainedUnit& unit, const EvalWindow& w,
                       std::span<HeadRows> heads, CodeBlock& block, ConstMatrix lower = {},
                       Matrix<float>* keep = nullptr, std::unique_ptr<SequenceState>* keep_state = nullptr);

// kBadData, with the place: a row of a unit's decoded `x`, from token `first` of the window on, is not finite. It would
// leave most metrics unharmed: what isn't attended to isn't seen.
void require_finite(const TraceRows& rows, const UnitShape& u, const EvalWindow& w, int64_t first, ConstMatrix x);

// Puts what a unit decoded of its head `head` into `hat`, (tokens, head_dim), from token `first` of the window on; keys
// that it codes before RoPE are rotated.
void put_decoded(const TraceRows& rows, const TrainedUnit& unit, const EvalWindow& w, ConstMatrix decoded, int head,
                 int64_t first, Matrix<float>& hat);

}  // namespace vqkv
