// Codes select and report documents with a frozen codec set and hands exact beside decoded rows to the metrics.
#pragma once
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "cache/cache.h"
#include "experiment/trace_rows.h"
#include "metric/metric.h"

namespace vqkv {

// The sweep's attention: which tokens a query sees coded, and how rows are scored. Rises when that changes a number:
// part of a cell's identity.
inline constexpr int kAttentionVersion = 1;

// Why no sweep measures under a policy, or "": it decides by what all queries attend to.
std::string not_swept(const CachePolicy& policy);

struct FidelityResult {
  std::vector<Measurement> select, report;
  double encode_seconds = 0, decode_seconds = 0, measure_seconds = 0;  // summed over threads for the first two
  int64_t coded_values = 0;                                            // K and V numbers that went through a codec
  double coded_share_k = 0, coded_share_v = 0;  // of the tokens that report queries attend to, the part that was coded
  std::vector<UnitExtras> extras;               // one a unit of the codec set, means over the report windows
};

// Everything of one (window, KV head) of a layer; keys after RoPE, rows as in FidelitySample.
struct HeadRows {
  Matrix<float> k, v, k_hat, v_hat;
  const CodeBlock* key_block = nullptr;  // on the first head of a unit
  const CodeBlock* value_block = nullptr;
  int64_t coded_k = 0, coded_v = 0;
  std::vector<Matrix<float>> older_k, older_v;  // (tiers - 1): what k_hat and v_hat become with age, as far as they do
};
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
CodingTotals code_unit(const TraceRows& rows, const CodecSet& codecs, const TrainedUnit& unit, const EvalWindow& w,
                       std::span<HeadRows> heads, CodeBlock& block, ConstMatrix lower = {},
                       Matrix<float>* keep = nullptr);

// kBadData, with the place: a row of a unit's decoded `x`, from token `first` of the window on, is not finite. It would
// leave most metrics unharmed: what isn't attended to isn't seen.
void require_finite(const TraceRows& rows, const UnitShape& u, const EvalWindow& w, int64_t first, ConstMatrix x);

// Puts what a unit decoded of its head `head` into `hat`, (tokens, head_dim), from token `first` of the window on; keys
// that it codes before RoPE are rotated.
void put_decoded(const TraceRows& rows, const TrainedUnit& unit, const EvalWindow& w, ConstMatrix decoded, int head,
                 int64_t first, Matrix<float>& hat);

// What bounds memory where contexts grow: attention rows (query head x query, tokens) are held in tiles of queries.
struct ScoreLimits {
  int64_t tile = int64_t{1} << 22;  // scores of a tile, one query's at least; a window within it is one tile
  int64_t held = int64_t{1} << 24;  // scores of the tiles in memory at once, one tile's at least
  // The most scores that measuring `windows` holds at once.
  int64_t peak(const std::vector<EvalWindow>& windows, int group) const;
};

// Layer by layer: at most one layer's rows of the select and report documents are in memory, and of their attention
// what `limits` allow. What is coded is rounded to exact_dtype in the codec's domain first, as a cache does; all rows
// must fit it (exact_rows).
// `progress(layers done)` may throw to stop.
FidelityResult measure_fidelity(const TraceRows& rows, const CodecSet& codecs, const std::function<void(int)>& progress,
                                const ScoreLimits& limits = {});

// The same through rows that another program decoded (`judge`): k_hat before RoPE and v_hat of a scope's head and
// window.
struct DecodedSource {
  virtual ~DecodedSource() = default;
  virtual void decoded(int layer, int head, const EvalWindow& w, MutMatrix k_hat, MutMatrix v_hat) const = 0;
};
FidelityResult measure_fidelity(const TraceRows& rows, const DecodedSource& source,
                                const std::function<void(int)>& progress);

}  // namespace vqkv
