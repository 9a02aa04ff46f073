#include <fmt/format.h>

#include <fstream>
#include <functional>

#include "config/sweep.h"
#include "core/error.h"
#include "experiment/plan.h"
#include "experiment/protocol.h"
#include "io/atomic_file.h"
#include "support/catch.h"
#include "support/sweep_trace.h"

using namespace vqkv;

namespace {

std::string error_of(const std::function<void()>& f, ErrorKind kind = ErrorKind::kUsage) {
  try {
    f();
  } catch (const Error& e) {
    CHECK(static_cast<int>(e.kind()) == static_cast<int>(kind));
    return e.what();
  }
  return "no error";
}
void has(const std::string& text, const std::string& part) {
  INFO(text);
  CHECK(text.find(part) != std::string::npos);
}

Config sweep_config(const std::string& trace, const std::string& more = "sweep: {grid: {codec.bits: [2, 4, 8]}}\n") {
  return parse_yaml(fmt::format("trace: {{path: {}, train: [0, 1], select: [2], report: [3, 4]}}\n"
                                "codec: {{name: rtn, group: 16}}\ncache: {{sinks: 4, window: 16, flush: 8}}\n{}",
                                trace, more),
                    "s.yaml");
}

}  // namespace

TEST_CASE("a plan freezes cells whose identity is what decides the numbers", "[plan]") {
  const TestFolder dir;
  const std::string trace = dir / "a.trace.h5";
  write_sweep_trace(trace);
  const Plan plan = make_plan(sweep_config(trace));
  REQUIRE(plan.cells.size() == 3);
  CHECK(plan_text(plan) == plan_text(make_plan(sweep_config(trace))));
  CHECK(plan.cells[0]["axes"] == Json::parse(R"({"codec.bits":2})"));
  CHECK(plan.cells[1]["cell"] != plan.cells[0]["cell"]);
  CHECK(plan.cells[0]["id"] == plan.cells[0]["cell"].get<std::string>().substr(0, 8));
  CHECK(plan.header["axes"] == Json::parse(R"(["codec.bits"])"));

  // Moved, the trace keeps its results; another seed, document or context does not.
  const std::string moved = dir / "b.trace.h5";
  std::filesystem::copy_file(trace, moved);
  CHECK(make_plan(sweep_config(moved)).hash() == plan.hash());
  for (const std::string change :
       {"seed: 5\n", "contexts: [1024]\n", "layers: [0]\n", "metrics: [key_nmse]\n", "train: {curve: true}\n"})
    CHECK(make_plan(sweep_config(trace, change + "sweep: {grid: {codec.bits: [2, 4, 8]}}\n")).cells[0]["cell"] !=
          plan.cells[0]["cell"]);
  // What only changes the measurement shares the training.
  CHECK(make_plan(sweep_config(trace, "contexts: [1024]\nsweep: {grid: {codec.bits: [2]}}\n")).cells[0]["train_id"] ==
        plan.cells[0]["train_id"]);
  CHECK(make_plan(sweep_config(trace, "seed: 5\nsweep: {grid: {codec.bits: [2]}}\n")).cells[0]["train_id"] !=
        plan.cells[0]["train_id"]);

  // Defaults written out and left out are one cell.
  const Plan spelled = make_plan(sweep_config(trace,
                                              "contexts: [4096, 32768]\nsequences: [1, 64]\nseed: 0\nlayers: "
                                              "all\nsweep: {grid: {codec.bits: [2, 4.0, 8, 8]}}\n"));
  CHECK(spelled.hash() == plan.hash());

  const std::string path = dir / "plan.jsonl";
  write_plan(plan, path);
  CHECK(plan_text(read_plan(path)) == plan_text(plan));
}

TEST_CASE("versions of all that makes a number are in a cell's identity, and another build's plan is refused",
          "[plan]") {
  const TestFolder dir;
  const std::string trace = dir / "a.trace.h5";
  write_sweep_trace(trace);
  const auto one = [&](const std::string& more) {
    return make_plan(sweep_config(trace, more + "sweep: {grid: {codec.bits: [4], codec.transform: [[center]]}}\n"));
  };
  const Plan plan = one("metrics: [softmax_kl, top_k]\n");
  const Json& versions = plan.cells[0]["versions"];
  for (const char* name : {"rtn", "transform.center", "metric.softmax_kl", "metric.top_k", "ledger", "attention"})
    CHECK(versions.contains(name));
  CHECK(versions.size() == 6);
  CHECK_NOTHROW(require_versions(plan));
  for (const auto& [name, version] : versions.items()) {
    INFO(name);
    Plan old = plan;
    old.cells[0]["versions"][name] = version.get<int>() - 1;
    has(error_of([&] { require_versions(old); }),
        fmt::format("{}: {} in the plan, {} here", name, version.get<int>() - 1, version.get<int>()));
    // A plan file that says so is another cell: its hash no longer fits.
    write_plan(old, dir / "plan.jsonl");
    has(error_of([&] { read_plan(dir / "plan.jsonl"); }, ErrorKind::kBadData), "plan again");
    if (name == "ledger" || name == "attention" || name.starts_with("metric.")) {
      old.cells[0]["versions"].erase(name);  // as earlier releases planned
      has(error_of([&] { require_versions(old); }), name + ": absent in the plan");
    }
  }
  // Metrics are measured, not trained.
  CHECK(one("metrics: [top_k]\n").cells[0]["train_id"] == plan.cells[0]["train_id"]);
}

TEST_CASE("without a cache section all codecs of a plan stand under one policy; a named preset brings its own",
          "[plan]") {
  const TestFolder dir;
  const std::string trace = dir / "a.trace.h5";
  write_sweep_trace(trace);
  const Plan plan = make_plan(parse_yaml(
      fmt::format("trace: {{path: {}, train: [0, 1], select: [2], report: [3, 4]}}\n"
                  "sweep: {{grid: {{codec: [{{name: rtn, group: 16}}, {{name: kivi, group: 16}}, {{name: exact}},\n"
                  "  {{name: kivi, group: 16, preset: r32}}]}}}}\n",
                  trace),
      "s.yaml"));
  REQUIRE(plan.cells.size() == 4);
  const Json& common = plan.cells[0]["config"]["cache"];
  CHECK(common == canonical_cache_config(Json::object()));
  CHECK(plan.cells[1]["config"]["cache"] == common);
  CHECK(plan.cells[2]["config"]["cache"] == common);
  CHECK(plan.cells[3]["config"]["cache"]["k"]["rule"] == "kivi");
  CHECK(protocol_of_cell(plan.cells[1]["config"]) == "window 128, blocks of 64 + 4 sinks");
  CHECK(protocol_of_cell(plan.cells[3]["config"]) == "keys: blocks of 32; values: window 33 (preset kivi r32)");
}

TEST_CASE("a training curve without select documents is refused", "[plan]") {
  const TestFolder dir;
  const std::string trace = dir / "a.trace.h5";
  write_sweep_trace(trace);
  has(error_of([&] {
        make_plan(parse_yaml(fmt::format("trace: {{path: {}, train: [0], report: [3]}}\ncodec: {{name: rvq}}\n"
                                         "train:\n  curve: true\n",
                                         trace),
                             "s.yaml"));
      }),
      "s.yaml:4:3: train.curve: a training curve is measured on select documents");
}

TEST_CASE("repeats are one group", "[plan]") {
  const TestFolder dir;
  const std::string trace = dir / "a.trace.h5";
  write_sweep_trace(trace);
  const Plan plan = make_plan(sweep_config(trace, "sweep: {grid: {codec.bits: [2, 4]}, repeat: {seed: [1, 2, 3]}}\n"));
  REQUIRE(plan.cells.size() == 6);
  CHECK(plan.cells[0]["group"] == plan.cells[1]["group"]);
  CHECK(plan.cells[0]["group"] == plan.cells[2]["group"]);
  CHECK(plan.cells[0]["group"] != plan.cells[3]["group"]);
  CHECK(plan.cells[1]["repeat"] == Json::parse(R"({"seed":2})"));
}

TEST_CASE("cells that can't be coded are planned as skipped, with the reason", "[plan]") {
  const TestFolder dir;
  const std::string trace = dir / "a.trace.h5";
  write_sweep_trace(trace);
  const Plan plan = make_plan(
      sweep_config(trace, "sweep: {grid: {codec.heads: [1, 3]}, skip: [{codec.heads: 1, codec.name: none}]}\n"));
  REQUIRE(plan.cells.size() == 2);
  CHECK_FALSE(plan.cells[0].contains("skip"));
  has(plan.cells[1]["skip"], "3 heads");
  const Plan ruled = make_plan(sweep_config(trace, "sweep: {grid: {codec.bits: [2, 4]}, skip: [{codec.bits: 2}]}\n"));
  has(ruled.cells[0]["skip"], "sweep.skip[0]");
  CHECK(ruled.header["skipped"] == 1);
}

TEST_CASE("configurations that lie are refused with their place", "[plan]") {
  const TestFolder dir;
  const std::string trace = dir / "a.trace.h5";
  write_sweep_trace(trace);
  const auto error = [&](const std::string& override_text) {
    return error_of([&] {
      Config c = sweep_config(trace, "");
      apply_override(c, override_text);
      make_plan(c);
    });
  };
  has(error("trace.report=[1]"), "document 1 also stands in trace.report");
  has(error("trace.select=[3]"), "documents have one role");
  has(error("trace.report=[9]"), "document 9 is not in");
  has(error("trace.report=[9]"), "0 doc0.txt (160 tokens)");
  has(error("trace.report="), "no document to report on");
  has(error("layers=[2]"), "layers 0 to 1");
  has(error("heads=[0, 7]"), "KV heads 0 to 1");
  has(error("codec.bitz=4"), "command line: codec.bitz");
  has(error("codec.bitz=4"), "bits");
  has(error("cache.wndow=4"), "window");
  has(error("metrics=[softmax]"), "softmax_kl");
  has(error("conexts=[4]"), "did you mean 'contexts'");
  has(error("sweep.grid.codec.bits=[4, 99]"), "in the cell {\"codec.bits\":99}");
  has(error_of([&] {
        make_plan(parse_yaml(
            fmt::format("trace: {{path: {}, train: [0], report: [3]}}\ncodec:\n  name: rtn\n  bits: 99\n", trace),
            "s.yaml"));
      }),
      "s.yaml:4:3: codec");
  has(error_of([&] { make_plan(parse_yaml("trace: {path: gone.h5, report: [1]}\ncodec: {name: rtn}\n", "s.yaml")); },
               ErrorKind::kBadData),
      "gone.h5");
}

TEST_CASE("an edited plan is refused", "[plan]") {
  const TestFolder dir;
  const std::string trace = dir / "a.trace.h5", path = dir / "plan.jsonl";
  write_sweep_trace(trace);
  const Plan plan = make_plan(sweep_config(trace));
  // Each line is held against its configuration whether the hash of all lines was forgotten or left behind.
  Plan unhashed = plan;
  unhashed.header.erase("content_xxh3");
  write_plan(unhashed, path);
  CHECK(read_plan(path).cells == plan.cells);
  const std::string good = plan_text(plan);
  const auto refuse = [&](std::string text) {
    write_file(path, text);
    return error_of([&] { read_plan(path); }, ErrorKind::kBadData);
  };
  std::string edited = good;
  edited.replace(edited.find("\"seed\":0"), 8, "\"seed\":1");
  has(refuse(edited), "plan again instead of editing");
  has(refuse(good.substr(0, good.size() - 20)), "unfinished");
  has(refuse(good.substr(0, good.rfind('\n', good.size() - 2) + 1)), "added or removed");
  has(refuse("{}\n"), "not a plan");
  has(refuse("[1]\n"), "JSON object");
  has(refuse(""), "not a plan");
  has(refuse("{\"plan_version\":99}\n"), "version 99");
  has(refuse("{\"plan_version\":1}\n{\"cell\":3}\n"), "missing or mistyped");

  const Plan other = make_plan(sweep_config(trace, "seed: 3\nsweep: {grid: {codec.bits: [2, 4, 8]}}\n"));
  const std::string difference = plan_difference(plan, other);
  has(difference, "0 cells in both, 3 only in the store's plan, 3 only in the new one");
  has(difference, "seed: 0 in the store, 3 in the new plan");
}
