// Sweep expansion: `sweep: {grid, zip, skip, repeat, streaming}` becomes a list of configurations without it.
//   grid:   {codec.bits: [4, 8], codec.codebooks: {range: [1, 4]}}   every combination
//   zip:    [{codec.name: [rvq, pq], codec.group: [64, 8]}]          the lists of one entry go together
//   skip:   [{codec.name: pq, codec.codebooks: 1}]                   a partial match; recorded as skipped, with the
//   rule repeat: {seed: [1, 2, 3]}                                        aggregated, never separate points streaming:
//   true                                                  what a window does alone, beside (experiment/plan.h)
// A value may be a whole map (`codec: [{name: rtn}, {name: kivi}]`): it replaces what stands at the path.
#pragma once
#include <string>
#include <vector>

#include "config/config.h"

namespace vqkv {

struct SweepPoint {
  Json tree;                     // resolved, without `sweep`
  Json axes = Json::object();    // path -> value of the swept paths
  Json repeat = Json::object();  // path -> value of the repeated ones
  std::string skip;              // the rule that matched, or ""
};

struct Sweep {
  std::vector<SweepPoint> points;
  std::map<std::string, ConfigMark> marks;  // of the configuration, a swept path pointing at its axis
  bool streaming = false;
};

inline constexpr int64_t kMaxSweepPoints = 100'000;
inline constexpr int64_t kMaxSweepBytes = 256 << 20;  // of resolved configurations, as canonical text

// Deterministic order: grid axes by path, the last one fastest; then zip entries; repeats innermost. No `sweep`: one
// point.
Sweep expand_sweep(const Config& config);

// SHA-256 of the canonical JSON.
std::string config_hash(const Json& value);

}  // namespace vqkv
