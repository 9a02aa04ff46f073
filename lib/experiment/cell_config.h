// The configuration of one cell, typed. The same fields, in the same places, are the YAML file, the overrides and the
// columns of a result: docs/configuration.md.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "cache/policy.h"
#include "config/config.h"

namespace vqkv {

struct CellConfig {
  std::string trace;                           // path of the trace
  std::vector<int64_t> train, select, report;  // document ids; the three never overlap
  int64_t train_tokens = 0;                    // rows a unit is trained on, evenly spaced; 0: all
  int64_t queries = 0;                         // recorded queries used a window, evenly spaced; 0: all
  Json codec, cache;                           // canonical
  std::vector<int64_t> layers, heads;          // of the trace; empty: all. A subsample is named in the row
  std::vector<std::string> metrics;
  std::vector<int64_t> contexts, sequences;  // of the byte columns
  int64_t seed = 0;
  bool curve = false;                 // also train with half and twice the iterations
  std::vector<int64_t> curve_layers;  // of these alone; empty: all of the cell's

  Json canonical() const;  // what plan.jsonl holds
  CachePolicy policy() const { return CachePolicy::from_json(cache); }
};

// Reads and checks a resolved configuration (no include, group or sweep left). Throws kUsage with file:line:column.
// Without `measured`, trace.report may be absent: the cell is trained and measured elsewhere; and the whole trace, for
// a cell that learns nothing.
CellConfig read_cell_config(const Config& config, bool measured = true);

}  // namespace vqkv
