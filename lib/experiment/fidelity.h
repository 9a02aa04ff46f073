// Codes select and report documents with a frozen codec set and hands exact beside decoded rows to the metrics.
#pragma once
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "cache/cache.h"
#include "experiment/coded_rows.h"
#include "metric/metric.h"

namespace vqkv {

// The sweep's attention: which tokens a query sees coded, and how rows are scored. Rises when that changes a number:
// part of a cell's identity.
inline constexpr int kAttentionVersion = 2;  // 2: rows that no cache codes are in no number

// Why no sweep measures under a policy, or "": it decides by what all queries attend to.
std::string not_swept(const CachePolicy& policy);

struct FidelityResult {
  std::vector<Measurement> select, report;
  double encode_seconds = 0, decode_seconds = 0, measure_seconds = 0;  // summed over threads for the first two
  int64_t coded_values = 0;                                            // K and V numbers that went through a codec
  double coded_share_k = 0, coded_share_v = 0;  // of the tokens that report queries attend to, the part that was coded
  std::vector<UnitExtras> extras;               // one a unit of the codec set, means over the report windows
};

// What bounds memory where contexts grow: attention rows (query head x query, tokens) are held in tiles of queries.
struct ScoreLimits {
  int64_t tile = int64_t{1} << 22;  // scores of a tile, one query's at least; a window within it is one tile
  int64_t held = int64_t{1} << 24;  // scores of the tiles in memory at once, one tile's at least
  // The most scores that measuring `windows` holds at once.
  int64_t peak(const std::vector<EvalWindow>& windows, int group) const;
};

// What a progress call throws where the user no longer waits.
struct Stopped {};

// Layer by layer: at most one layer's rows of the select and report documents are in memory, and of their attention
// what `limits` allow. What is coded is rounded to exact_dtype in the codec's domain first, as a cache does; all rows
// must fit it (exact_rows).
// `progress(layers done)` may throw Stopped.
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
