// Any codec written elsewhere: its reconstructed keys and values through our metrics, on the documents of a trace.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "core/json.h"

namespace vqkv {

struct JudgeOptions {
  std::string trace, recon;
  int64_t bytes = 0;                   // kept for all tokens of the trace, side data included
  std::vector<std::string> overrides;  // of trace.report, trace.queries, cache, layers, heads, metrics
  std::function<bool()> stop;
};

// {measurements: [...], coverage: {...}, config: {...}, protocol: which tokens stood exact, in words}; all documents
// are reported on unless trace.report says which. Null when `stop` said so.
Json judge(const JudgeOptions& options);

}  // namespace vqkv
