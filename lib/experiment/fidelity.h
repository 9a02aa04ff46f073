// Codes select and report documents with a frozen codec set and hands exact beside decoded rows to the metrics.
#pragma once
#include <functional>
#include <vector>

#include "experiment/trace_rows.h"
#include "metric/metric.h"

namespace vqkv {

struct FidelityResult {
  std::vector<Measurement> select, report;
  double encode_seconds = 0, decode_seconds = 0, measure_seconds = 0;  // summed over threads for the first two
  int64_t coded_values = 0;                                            // K and V numbers that went through a codec
  double coded_share_k = 0, coded_share_v = 0;  // of the tokens that report queries attend to, the part that was coded
};

// Layer by layer: at most one layer's rows of the select and report documents are in memory. Keys and values are
// rounded to exact_dtype in the codec's domain first, as a cache does. `progress(layers done)` may throw to stop.
FidelityResult measure_fidelity(const TraceRows& rows, const CodecSet& codecs,
                                const std::function<void(int)>& progress);

// The same through rows that another program decoded (`judge`): k_hat before RoPE and v_hat of a scope's head and
// window.
struct DecodedSource {
  virtual ~DecodedSource() = default;
  virtual void decoded(int layer, int head, const EvalWindow& w, MutMatrix k_hat, MutMatrix v_hat) const = 0;
};
FidelityResult measure_fidelity(const TraceRows& rows, const DecodedSource& source,
                                const std::function<void(int)>& progress);

}  // namespace vqkv
