// A plan of a few codecs over a trace of noise, for tests of runs.
#pragma once
#include <fmt/format.h>

#include <string>

#include "config/sweep.h"
#include "core/thread_pool.h"
#include "experiment/plan.h"
#include "support/sweep_trace.h"

namespace vqkv {

// Codecs that train nothing, a trained one with shared units, keys before RoPE, a block codec, a skipped cell.
inline constexpr const char* kSweep =
    "cache: {sinks: 4, window: 16, flush: 16}\ncontexts: [128, 1024]\n"
    "sweep:\n  grid:\n    codec:\n"
    "      - {name: rtn, bits: 2, group: 16}\n      - {name: rtn, bits: 4, group: 16}\n      - {name: rtn, bits: 8, "
    "group: 16}\n"
    "      - {name: rtn, bits: 4, group: 16, rope: pre, transform: [center]}\n"
    "      - {name: kivi, bits: 2, group: 16}\n"
    "      - {name: rvq, codebooks: 2, bits: 4, heads: 2, iterations: 4, transform: [hadamard]}\n"
    "      - {name: rtn, bits: 4, heads: 3}\n";

inline Plan small_plan(const std::string& trace, const std::string& sweep = kSweep, const std::string& more = "") {
  Config config = parse_yaml(
      fmt::format("trace: {{path: {}, train: [0, 1], select: [2], report: [3, 4]}}\n{}{}", trace, more, sweep),
      "s.yaml");
  config.tree["sweep"]["streaming"] = false;
  return make_plan(config);
}

struct Threads {
  int before = thread_count();
  explicit Threads(int n) { set_thread_count(n); }
  ~Threads() { set_thread_count(before); }
};

}  // namespace vqkv
