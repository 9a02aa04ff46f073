// What a dry run looks at before it says what a plan takes.
#include "experiment/estimate.h"

#include <fmt/format.h>

#include "experiment/result_set.h"
#include "experiment/runner.h"
#include "support/catch.h"
#include "support/sweep_trace.h"

using namespace vqkv;

TEST_CASE("a dry run times each training, whatever its seed and cache, and some of many", "[estimate]") {
  const TestFolder dir;
  const std::string trace = dir / "t.trace.h5";
  write_sweep_trace(trace, 3, 40);
  const auto probed = [&](const std::string& sweep) {
    const Plan plan = make_plan(parse_yaml(
        fmt::format("trace: {{path: {}, train: [0, 1], report: [2]}}\ncodec: {{name: rvq, codebooks: 1, bits: 2}}\n"
                    "cache: {{sinks: 4, window: 8, flush: 8}}\nmetrics: [key_nmse]\nsweep: {}\n",
                    trace, sweep),
        "s.yaml"));
    const PlanEstimate e = estimate_plan(plan, {});
    CHECK(e.seconds > 0);
    return e.probed;
  };
  // Seconds or hours: which of them it is shows in the knobs alone.
  CHECK(probed("{grid: {codec.iterations: [1, 2]}, repeat: {seed: [1, 2]}}") == 2);
  CHECK(probed("{grid: {codec.iterations: [1, 2, 3], cache.window: [0, 8]}}") == 3);
  CHECK(probed("{grid: {trace.train: [[0], [1]]}}") == 2);
  CHECK(probed("{grid: {codec.iterations: {range: [1, 40]}}}") == 16);
}

TEST_CASE("a dry run names the cells that would fail and counts the others", "[estimate]") {
  const TestFolder dir;
  const std::string trace = dir / "t.trace.h5";  // without gradients
  write_sweep_trace(trace, 3, 40);
  const Plan plan = make_plan(parse_yaml(
      fmt::format("trace: {{path: {}, train: [0, 1], report: [2]}}\ncodec: {{name: kvquant}}\n"
                  "cache: {{sinks: 4, window: 8, flush: 8}}\nmetrics: [key_nmse]\n"
                  "sweep: {{grid: {{codec.weight: [fisher, none]}}, repeat: {{seed: [1, 2]}}, streaming: false}}\n",
                  trace),
      "s.yaml"));
  const PlanEstimate e = estimate_plan(plan, {});
  CHECK(e.probed == 2);
  CHECK(e.seconds > 0);
  REQUIRE(e.failures.size() == 1);
  CHECK(e.failures[0].alike == 2);
  CHECK(e.failures[0].cell->at("axes").at("codec.weight") == "fisher");
  CHECK(e.failures[0].reason.find("holds no squared gradients") != std::string::npos);
  // What the run says of the same cell.
  RunOptions options;
  options.folder = dir / "out";
  const RunSummary run = run_plan(plan, options);
  CHECK(run.ok == 2);
  CHECK(run.failed == 2);
  const ResultSet results = load_results(dir / "out");
  for (const auto& c : results.cells)
    if (c.cell.at("id") == e.failures[0].cell->at("id")) CHECK(c.reason() == e.failures[0].reason);
}
