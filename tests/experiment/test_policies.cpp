// Policies of which tokens stay, in a sweep.
#include <fmt/format.h>

#include "experiment/plan.h"
#include "experiment/protocol.h"
#include "experiment/report.h"
#include "experiment/result_set.h"
#include "experiment/runner.h"
#include "io/atomic_file.h"
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

TEST_CASE("a sweep asks for what a window does alone: one cell a protocol, beside the codecs", "[policy]") {
  const TestFolder dir;
  const std::string trace = dir / "a.trace.h5";
  write_sweep_trace(trace);
  const auto plan_of = [&](const char* rest, const char* sweep) {
    return make_plan(parse_yaml(fmt::format("trace: {{path: {}, train: [0, 1], select: [2], report: [3, 4]}}\n"
                                            "contexts: [128]\n{}\nsweep:\n  {}\n",
                                            trace, rest, sweep),
                                "s.yaml"));
  };
  const auto protocols = [](const Plan& plan) {
    std::vector<std::string> out;
    for (const Json& c : plan.cells)
      if (c.at("config").at("cache").contains("policy")) {
        CHECK(c.at("config").at("codec").at("k").at("name") == "exact");
        CHECK(c.at("axes").at("cache.policy") == "streaming");
        out.push_back(protocol_of_cell(c.at("config")));
      }
    return out;
  };
  using Texts = std::vector<std::string>;
  const char* const cache = "cache: {sinks: 4, window: 16, flush: 16}";
  const char* const codecs =
      "grid: {codec: [{name: rtn, bits: 2, group: 16}, {name: rtn, bits: 4, group: 16}, {name: rtn, heads: 3}]}";
  const Plan plan = plan_of(cache, codecs);
  CHECK(plan.cells.size() == 4);
  CHECK(protocols(plan) == Texts{"window 16, blocks of 16 + 4 sinks, nothing else"});
  CHECK(plan.header.at("axes") == Json::array({"cache.policy", "codec"}));
  CHECK(plan_of(cache, fmt::format("streaming: false\n  {}", codecs).c_str()).cells.size() == 3);
  // Of each window; not of the codec's knobs or seeds.
  CHECK(protocols(plan_of("codec: {name: rtn, group: 16}",
                          "grid: {cache.window: [16, 32], codec.bits: [2, 4], trace.train_tokens: [64, 128]}\n"
                          "  repeat: {seed: [1, 2]}")) ==
        Texts{"window 16, blocks of 64 + 4 sinks, nothing else", "window 32, blocks of 64 + 4 sinks, nothing else"});
  // Keys and values that leave by rules of their own have no window alone; nothing coded, none beside.
  for (const char* other : {"cache: {rule: kivi, residual: 32}", "cache: {rule: none}", "cache: {window: 0}"})
    CHECK(protocols(plan_of(other, codecs)).empty());

  RunOptions options;
  options.folder = dir / "out";
  CHECK(run_plan(plan, options).ok == 3);
  const ResultSet results = load_results(options.folder);
  CHECK(results.cells.back().value("report", "output.relative_error") > 0.05);
  write_report(results, dir / "r.html");
  const std::string html = read_file(dir / "r.html");
  for (const char* part : {"exact policy=streaming<", "window 16, blocks of 16 + 4 sinks, nothing else", "n = 2 report",
                           "Exact beside the codes, in every row: window 16, blocks of 16 + 4 sinks."})
    CHECK_THAT(html, Catch::Contains(part));
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
  const Plan plan =
      make_plan(config("sweep: {grid: {cache.policy: [all, {name: h2o, heavy: 64}, {name: snapkv, interval: 128, "
                       "observe: 16}]}, streaming: false}"));
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
