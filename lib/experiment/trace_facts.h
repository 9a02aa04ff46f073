// What a plan needs to know of a trace, without its rows.
#pragma once
#include <string>
#include <vector>

#include "config/config.h"
#include "core/cache_shape.h"
#include "core/json.h"
#include "experiment/cell_config.h"
#include "io/trace.h"

namespace vqkv {

struct TraceFacts {
  CacheShape shape;
  std::vector<TraceDocument> documents;
  Json json;  // as a plan's header holds them
};

TraceFacts read_trace_facts(const std::string& path);
// kUsage, with the place in `config`: documents, layers or heads that the trace of `c` hasn't.
void check_against_trace(const Config& config, const CellConfig& c, const TraceFacts& f);

}  // namespace vqkv
