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

TEST_CASE("coded: image in a sweep: an image is coded, text never, and a trace that tells neither codes nothing",
          "[policy]") {
  const TestFolder dir;
  const std::string typed = dir / "typed.trace.h5", untyped = dir / "untyped.trace.h5", apart = dir / "apart.trace.h5";
  const auto write = [](const std::string& path, const std::function<void(TraceWindowData&)>& edit) {
    write_sweep_trace(path, 5, 160, 2, 2, 16, 1, 0, nullptr, edit, 8, "", {"text", "image"});
  };
  write(typed, image_at(30, 94));
  write_sweep_trace(untyped);
  write(apart, [](TraceWindowData& w) {
    image_at(30, 60)(w);
    image_at(70, 90)(w);
  });
  const auto results_of = [&](const std::string& trace, const char* codec, const char* cache, const char* out) {
    const Plan plan = make_plan(
        parse_yaml(fmt::format("trace: {{path: {}, train: [0, 1], select: [2], report: [3, 4]}}\ncodec: {}\n{}"
                               "contexts: [94, 160, 1024]\nsweep: {{streaming: false}}\n",
                               trace, codec, cache),
                   "s.yaml"));
    RunOptions options;
    options.folder = dir / out;
    run_plan(plan, options);
    return load_results(options.folder);
  };
  // The preset's own cache.
  const ResultSet coded = results_of(typed, "{name: calibquant, preset: b4}", "", "a");
  REQUIRE(coded.cells.size() == 1);
  const CellResult& c = coded.cells[0];
  REQUIRE(c.record.at("status") == "ok");
  CHECK(c.record.at("flags").empty());
  CHECK(protocol_of_cell(c.cell.at("config")) == "image tokens coded, text exact (preset calibquant default)");
  CHECK(c.value("report", "attention.softmax_kl") > 0);
  // Of 160 tokens of which 64 are coded, by its queries at every eighth position.
  double seen = 0, all = 0;
  for (int64_t p = 7; p < 160; p += 8) {
    seen += p >= 93 ? 64 : 0;
    all += static_cast<double>(p + 1);
  }
  CHECK(c.record.at("coverage").at("coded_share_k").get<double>() == Approx(seen / all));
  // Text at its true bytes: two layers, two heads of 16 in two roles, f16.
  const int64_t token = 2 * 2 * 16 * 2 * 2;
  for (const auto& [context, image] : {std::pair{94, 64}, {160, 64}, {1024, 64}}) {
    const Json& ledger = c.record.at("ledger").at(std::to_string(context));
    CHECK(ledger.at("sinks").get<int64_t>() == 30 * token);
    CHECK(ledger.at("window").get<int64_t>() == (context - 30 - image) * token);
    CHECK(ledger.at("codes").get<int64_t>() == image * token / 4);
    CHECK(ledger.at("side").get<int64_t>() == 2 * 2 * 16 * 2 * 4);
  }
  // What learns learns of images alone.
  const ResultSet learned = results_of(typed, "{name: rvq, codebooks: 1, bits: 2}", "cache: {coded: image}\n", "b");
  CHECK(learned.cells.at(0).record.at("train").at("tokens") == 2 * 64);
  CHECK(learned.cells.at(0).record.at("flags").empty());

  const ResultSet nothing = results_of(untyped, "{name: calibquant, preset: default}", "", "c");
  CHECK(nothing.cells.at(0).flagged("nothing-coded"));
  CHECK(nothing.cells.at(0).value("report", "attention.softmax_kl") == 0);
  const ResultSet text = results_of(untyped, "{name: calibquant, preset: default}",
                                    "cache: {sinks: 41, window: 0, flush: 1, prompt: 100, generated: exact}\n", "d");
  CHECK(text.cells.at(0).flagged("off-label"));
  const ResultSet split = results_of(apart, "{name: calibquant, preset: default}", "", "e");
  CHECK(split.cells.at(0).record.at("status") == "failed");
  CHECK_THAT(split.cells.at(0).record.at("reason").get<std::string>(),
             Catch::Contains("image tokens 30 to 59") && Catch::Contains("another at 70"));
}
