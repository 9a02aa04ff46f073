// Policies of which tokens stay, in a sweep.
#include <fmt/format.h>

#include "experiment/plan.h"
#include "experiment/protocol.h"
#include "experiment/result_set.h"
#include "experiment/runner.h"
#include "support/catch.h"
#include "support/sweep_trace.h"

using namespace vqkv;

TEST_CASE("streaming in a sweep: what attention loses to a window alone, and no number about codes", "[policy]") {
  const TestFolder dir;
  const std::string trace = dir / "a.trace.h5";
  write_sweep_trace(trace);
  const Plan plan = make_plan(
      parse_yaml(fmt::format("trace: {{path: {}, train: [0, 1], select: [2], report: [3, 4]}}\ncodec: {{name: exact}}\n"
                             "contexts: [128, 1024]\ncache: {{sinks: 4, flush: 16}}\n"
                             "sweep: {{grid: {{cache.window: [16, 64, 1000], cache.policy: [streaming, all]}}}}\n",
                             trace),
                 "s.yaml"));
  RunOptions options;
  options.folder = dir / "out";
  CHECK(run_plan(plan, options).ok == 6);
  const ResultSet results = load_results(options.folder);
  std::map<int64_t, const CellResult*> by_window;
  for (const CellResult& c : results.cells) {
    const Json& config = c.cell.at("config");
    const int64_t window = config.at("cache").at("k").at("window");
    CHECK(c.flagged("nothing-coded") == (window == 1000));
    if (!config.at("cache").contains("policy")) {
      CHECK(c.find("report", "attention.softmax_kl") != nullptr);
      continue;
    }
    by_window[window] = &c;
    CHECK(protocol_of_cell(config) == fmt::format("window {}, blocks of 16 + 4 sinks, nothing else", window));
    for (const char* tag : {"key.nmse", "value.nmse", "attention.softmax_kl"}) CHECK(c.find("report", tag) == nullptr);
    for (const Json& m : c.record.at("measurements")) CHECK(m.at("value").is_number());
    CHECK(c.find("cost", "bits_per_value.codes") == nullptr);
    CHECK(c.value("cost", "bytes.constants") == 0);
    // Resident bytes stop growing where the window is full.
    if (window < 128) CHECK(c.value("cost", "bytes", 1024) <= 1.5 * c.value("cost", "bytes", 128));
  }
  REQUIRE(by_window.size() == 3);
  const auto error = [&](int64_t window) { return by_window[window]->value("report", "output.relative_error"); };
  CHECK(error(16) > 1.2 * error(64));
  CHECK(error(64) > 0.05);
  CHECK(error(1000) == 0);  // nothing has left
  CHECK(by_window[16]->value("report", "attention.top1_mass_recall") < 1);
}

TEST_CASE("policies that ask every query are planned as skipped, and the reason names what measures them", "[policy]") {
  const TestFolder dir;
  const std::string trace = dir / "a.trace.h5";
  write_sweep_trace(trace);
  const auto config = [&](const char* rest) {
    return parse_yaml(
        fmt::format("trace: {{path: {}, train: [0, 1], report: [3]}}\ncodec: {{name: exact}}\n{}", trace, rest),
        "s.yaml");
  };
  const Plan plan = make_plan(config(
      "sweep: {grid: {cache.policy: [all, {name: h2o, heavy: 64}, {name: snapkv, interval: 128, observe: 16}]}}"));
  REQUIRE(plan.cells.size() == 3);
  int skipped = 0;
  for (const Json& cell : plan.cells)
    if (cell.contains("skip")) {
      ++skipped;
      CHECK_THAT(cell["skip"].get<std::string>(), Catch::Contains("vqkv-eval replay"));
    }
  CHECK(skipped == 2);
  // A cell for a replay is none of a sweep.
  const Json cell = make_cell(config("cache: {policy: {name: h2o, heavy: 64}}"));
  CHECK_THAT(protocol_of_cell(cell.at("config")), Catch::Contains("h2o: heavy 64, recent 0.1, every 64"));
}
