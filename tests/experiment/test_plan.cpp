#include <fmt/format.h>

#include <fstream>
#include <functional>

#include "config/sweep.h"
#include "core/error.h"
#include "experiment/plan.h"
#include "experiment/protocol.h"
#include "io/atomic_file.h"
#include "io/trace.h"
#include "support/cache_shape.h"
#include "support/catch.h"
#include "support/error_of.h"
#include "support/sweep_trace.h"

using namespace vqkv;

namespace {

Config sweep_config(const std::string& trace, const std::string& more = "sweep: {grid: {codec.bits: [2, 4, 8]}}\n") {
  Config config = parse_yaml(fmt::format("trace: {{path: {}, train: [0, 1], select: [2], report: [3, 4]}}\n"
                                         "codec: {{name: rtn, group: 16}}\n"
                                         "cache: {{sinks: 4, window: 16, flush: 8}}\n{}",
                                         trace, more),
                             "s.yaml");
  if (config.tree["sweep"].is_object()) config.tree["sweep"]["streaming"] = false;
  return config;
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
  const auto one = [&](const std::string& metrics, const std::string& policy) {
    return make_plan(
        sweep_config(trace, fmt::format("metrics: [{}]\nsweep: {{grid: {{codec.bits: [4], codec.transform: [[center]], "
                                        "cache.policy: [{}]}}}}\n",
                                        metrics, policy)));
  };
  const Plan plan = one("softmax_kl, top_k", "streaming");
  const Json& versions = plan.cells[0]["versions"];
  for (const char* name :
       {"rtn", "transform.center", "metric.softmax_kl", "metric.top_k", "policy.streaming", "ledger", "attention"})
    CHECK(versions.contains(name));
  CHECK(versions.size() == 7);
  CHECK_NOTHROW(require_versions(plan));
  for (const auto& [name, version] : versions.items()) {
    INFO(name);
    Plan old = plan;
    old.cells[0]["versions"][name] = version.get<int>() - 1;
    check_says(error_of([&] { require_versions(old); }),
               fmt::format("{}: {} in the plan, {} here", name, version.get<int>() - 1, version.get<int>()));
    // A plan file that says so is another cell: its hash no longer fits.
    write_plan(old, dir / "plan.jsonl");
    check_says(error_of([&] { read_plan(dir / "plan.jsonl"); }, ErrorKind::kBadData), "plan again");
    if (name == "ledger" || name == "attention" || name.starts_with("metric.") || name.starts_with("policy.")) {
      old.cells[0]["versions"].erase(name);  // as earlier releases planned
      check_says(error_of([&] { require_versions(old); }), name + ": absent in the plan");
    }
  }
  // Metrics are measured under a policy, not trained.
  const Plan other = one("top_k", "all");
  CHECK(other.cells[0]["train_id"] == plan.cells[0]["train_id"]);
  CHECK(other.cells[0]["versions"].size() == 5);  // all tokens stay: what the rules do is the attention's version
}

TEST_CASE("without a cache section all codecs of a plan stand under one policy, a named preset brings its own",
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
  REQUIRE(plan.cells.size() == 5);
  const Json& common = plan.cells[0]["config"]["cache"];
  CHECK(common == canonical_cache_config(Json::object()));
  CHECK(plan.cells[1]["config"]["cache"] == common);
  CHECK(plan.cells[2]["config"]["cache"] == common);
  CHECK(plan.cells[3]["config"]["cache"]["k"]["rule"] == "kivi");
  CHECK(protocol_of_cell(plan.cells[1]["config"]) == "window 128, blocks of 64 + 4 sinks");
  CHECK(protocol_of_cell(plan.cells[3]["config"]) == "keys: blocks of 32; values: window 33 (preset kivi r32)");
  // What the window of the shared policy does alone; the preset's sides leave by rules of their own and have no such
  // row.
  CHECK(plan.cells[4]["axes"]["cache.policy"] == "streaming");
  Json alone = plan.cells[4]["config"]["cache"];
  alone.erase("policy");
  CHECK(alone == common);
}

TEST_CASE("a training curve without select documents, or of layers that are not there, is refused", "[plan]") {
  const TestFolder dir;
  const std::string trace = dir / "a.trace.h5";
  write_sweep_trace(trace);
  const auto refused = [&](const std::string& documents, const std::string& rest) {
    return error_of([&] {
      make_plan(parse_yaml(fmt::format("trace: {{path: {}, train: [0]{}, report: [3]}}\ncodec: {{name: rvq}}\n{}",
                                       trace, documents, rest),
                           "s.yaml"));
    });
  };
  check_says(refused("", "train:\n  curve: true\n"),
             "s.yaml:4:3: train.curve: a training curve is measured on select documents");
  check_says(refused(", select: [1]", "layers: [0, 1]\ntrain:\n  curve: [1, 2]\n"),
             "s.yaml:5:3: train.curve: layer 2 is none of the cell's (layers)");
  check_says(refused(", select: [1]", "train:\n  curve: [40]\n"), "s.yaml:4:3: train.curve: 40 is not in");
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
  check_says(plan.cells[1]["skip"], "3 heads");
  const Plan ruled = make_plan(sweep_config(trace, "sweep: {grid: {codec.bits: [2, 4]}, skip: [{codec.bits: 2}]}\n"));
  check_says(ruled.cells[0]["skip"], "sweep.skip[0]");
  CHECK(ruled.header["skipped"] == 1);
}

TEST_CASE("tiers are swept by their number, and those that a cache can't hold are skipped", "[plan][tiers]") {
  const TestFolder dir;
  const std::string trace = dir / "a.trace.h5";
  write_sweep_trace(trace);
  const auto planned = [&](const std::string& grid) {
    Config config = sweep_config(trace, "sweep: {grid: {" + grid + "}}\n");
    config.tree["codec"] = Json::parse(R"({"tiers": [
        {"tokens": 16, "name": "rvq", "codebooks": 4, "bits": 3}, {"name": "rtn", "group": 16}]})");
    return make_plan(config);
  };
  const Plan bits = planned("codec.tiers.0.bits: [2, 4], codec.tiers.1.bits: [2, 3]");
  REQUIRE(bits.cells.size() == 4);
  CHECK(bits.cells[1]["axes"] == Json::parse(R"({"codec.tiers.0.bits": 2, "codec.tiers.1.bits": 3})"));
  CHECK(bits.cells[1]["config"]["codec"]["tiers"][1]["k"]["bits"] == 3);
  CHECK(bits.cells[1]["config"]["codec"]["tiers"][0]["v"]["bits"] == 2);
  CHECK(bits.cells[0]["versions"].contains("rtn"));
  CHECK(bits.cells[0]["cell"] != bits.cells[1]["cell"]);
  const Plan tokens = planned("codec.tiers.0.tokens: [24, 12]");
  CHECK_FALSE(tokens.cells[0].contains("skip"));
  check_says(tokens.cells[1]["skip"],
             "s.yaml:4:16: codec.tiers[0].tokens: 12 is not a multiple of 8, the flush of cache.k");
  const Plan second = planned("codec.tiers.1: [{level: 2}, {level: 4}, {name: pq, codebooks: 4, bits: 3}]");
  CHECK_FALSE(second.cells[0].contains("skip"));
  check_says(second.cells[1]["skip"], "1 to 3");
  CHECK_FALSE(second.cells[2].contains("skip"));
  // A boundary that moves trains nothing again.
  CHECK(tokens.cells[0]["cell"] != tokens.cells[1]["cell"]);
  CHECK(tokens.cells[0]["train_id"] == tokens.cells[1]["train_id"]);
  CHECK(bits.cells[0]["train_id"] != bits.cells[1]["train_id"]);
  CHECK(second.cells[0]["train_id"] == second.cells[1]["train_id"]);  // nor do levels that are cut
  CHECK(second.cells[0]["train_id"] != second.cells[2]["train_id"]);
  check_says(error_of([&] { planned("codec.tiers.2.bits: [2]"); }), "list of 2 entries");
  check_says(error_of([&] { planned("codec.tiers.1.bit: [2]"); }), "did you mean 'bits'");
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
  check_says(error("trace.report=[1]"), "document 1 also stands in trace.report");
  check_says(error("trace.select=[3]"), "documents have one role");
  check_says(error("trace.report=[9]"), "document 9 is not in");
  check_says(error("trace.report=[9]"), "0 doc0.txt (160 tokens)");
  check_says(error("trace.report="), "no document to report on");
  check_says(error("layers=[2]"), "layers 0 to 1");
  check_says(error("heads=[0, 7]"), "KV heads 0 to 1");
  check_says(error("codec.bitz=4"), "command line: codec: unknown key 'bitz'");
  check_says(error("codec.bitz=4"), "bits");
  check_says(error("cache.wndow=4"), "window");
  check_says(error("metrics=[softmax]"), "softmax_kl");
  check_says(error("conexts=[4]"), "did you mean 'contexts'");
  check_says(error("sweep.grid.codec.bits=[4, 99]"), "in the cell {\"codec.bits\":99}");
  check_says(
      error_of([&] {
        make_plan(parse_yaml(
            fmt::format("trace: {{path: {}, train: [0], report: [3]}}\ncodec:\n  name: rtn\n  bits: 99\n", trace),
            "s.yaml"));
      }),
      "s.yaml:4:3: codec");
  check_says(
      error_of([&] { make_plan(parse_yaml("trace: {path: gone.h5, report: [1]}\ncodec: {name: rtn}\n", "s.yaml")); },
               ErrorKind::kBadData),
      "gone.h5");
}

TEST_CASE("no list of a plan may be empty, and null leaves every key at what it would be without it", "[plan]") {
  const TestFolder dir;
  const std::string trace = dir / "a.trace.h5";
  write_sweep_trace(trace);
  const auto planned = [&](const std::string& more, const std::vector<std::string>& overrides) {
    Config c = sweep_config(trace, more);
    for (const auto& o : overrides) apply_override(c, o);
    return make_plan(c);
  };
  for (const char* list : {"layers", "heads", "metrics", "contexts", "sequences", "trace.train", "trace.select",
                           "trace.report", "codec.overrides", "sweep.skip", "sweep.zip", "sweep.grid.codec.bits"})
    check_says(error_of([&] { planned("", {fmt::format("{}=[]", list)}); }),
               fmt::format("command line: {}: an empty list; leave the key out", list));
  check_says(
      error_of([&] { planned("", {"codec.overrides=[{layers: [], set: {bits: 2}}]"}); }),
      "codec.overrides[0].layers: an empty list; leave the key out (or write null) for what holds without it, or all");
  // No transform is a list without any.
  CHECK(planned("", {"codec.transform=[]"}).hash() == planned("", {}).hash());

  const Plan plain = planned("", {});
  std::vector<std::string> nulls;
  for (const char* key : {"layers",
                          "heads",
                          "metrics",
                          "contexts",
                          "sequences",
                          "seed",
                          "train",
                          "trace.train_tokens",
                          "trace.queries",
                          "codec.bits",
                          "codec.k",
                          "codec.v.bits",
                          "codec.overrides",
                          "codec.transform",
                          "codec.rope",
                          "codec.heads",
                          "codec.share",
                          "codec.preset",
                          "cache.rule",
                          "cache.k",
                          "cache.v.window",
                          "cache.policy",
                          "cache.exact_dtype",
                          "cache.residual",
                          "groups",
                          "sweep"})
    nulls.push_back(fmt::format("{}=null", key));
  for (const auto& one : nulls) {
    INFO(one);
    CHECK(planned("", {one}).hash() == plain.hash());
  }
  // What is inherited holds, not the default.
  CHECK(planned("", {"codec.bits=2", "codec.k.bits=null"}).hash() == planned("", {"codec.bits=2"}).hash());
  CHECK(planned("", {"cache.policy={name: streaming, x: null}"}).hash() ==
        planned("", {"cache.policy=streaming"}).hash());
  // Roles without documents come back from a file as they went.
  const std::string path = dir / "plan.jsonl";
  write_plan(planned("", {"trace.train=null", "trace.select=null"}), path);
  CHECK(config_of(read_plan(path).cells[0]).train.empty());
}

TEST_CASE("what learns needs train documents when it is planned, and is named", "[plan]") {
  const TestFolder dir;
  const std::string trace = dir / "a.trace.h5";
  write_sweep_trace(trace);
  const auto config = [&](const std::string& codec) {
    return parse_yaml(fmt::format("trace:\n  path: {}\n  report: [3]\ncodec: {}\n", trace, codec), "s.yaml");
  };
  const std::string begin = "s.yaml:1:1: trace.train: no document to learn from, and ";
  for (const auto& plan :
       {std::function([](const Config& c) { make_plan(c); }), std::function([](const Config& c) { make_cell(c); })}) {
    check_says(error_of([&] { plan(config("{name: rvq}")); }), begin + "codec 'rvq' (role k) learns");
    check_says(error_of([&] { plan(config("{name: rtn, group: 16, v: {transform: [center]}}")); }),
               begin + "transform 'center' (role v) learns");
    CHECK_NOTHROW(plan(config("{name: rtn, group: 16, transform: [hadamard]}")));
  }
  // A cell of a sweep is named; one that is skipped anyway need not learn.
  Config swept = config("{name: rtn, group: 16}");
  apply_override(swept, "sweep.grid.codec.transform=[[], [center]]");
  check_says(error_of([&] { make_plan(swept); }), "in the cell {\"codec.transform\":[\"center\"]}");
  apply_override(swept, "sweep.skip=[{codec.transform: [center]}]");
  CHECK(make_plan(swept).header["skipped"] == 1);
}

TEST_CASE("a cell in which nothing learns needs no trace", "[plan]") {
  const CacheShape shape = test::make_shape(2, 1, 2, 16);
  const auto cell = [&](const std::string& text) { return make_untraced_cell(parse_yaml(text, "c.yaml"), shape, "m"); };
  const auto made = cell("codec: {name: kivi, group: 16}\ncache: {sinks: 0}\nsweep: ~\n");
  REQUIRE(made);
  CHECK(made->codecs->units().size() == 8);
  CHECK(made->codecs->model_hash() == "m");
  CHECK(made->config.cache["sinks"] == 0);
  CHECK_FALSE(cell("trace: {path: t.h5}\ncodec: {name: rtn, group: 16}\n"));
  check_says(error_of([&] { cell("codec:\n  name: pq\n"); }), "c.yaml:1:1: codec 'pq' (role k) learns from a trace");
  check_says(error_of([&] { cell("codec: {name: rtn, group: 16}\ntrace: {train: [0]}\n"); }), "c.yaml:2:1: trace.path");
}

TEST_CASE("mistakes in transforms, overrides and policies have a line", "[plan]") {
  const TestFolder dir;
  const std::string trace = dir / "a.trace.h5";
  write_sweep_trace(trace);
  const auto error = [&](const std::string& more) {
    return error_of([&] {
      make_plan(parse_yaml(fmt::format("trace: {{path: {}, train: [0], report: [3]}}\n{}", trace, more), "s.yaml"));
    });
  };
  check_says(error("codec:\n  name: rtn\n  transform:\n    - center\n    - {name: low_rank, rank: -1}\n"),
             "s.yaml:6:24: codec.transform[1].rank: expected an integer");
  check_says(error("codec:\n  name: rtn\n  transform:\n    - {name: low_rank, rnk: 4}\n"),
             "s.yaml:5:24: codec.transform[0]: unknown key 'rnk', did you mean 'rank'?");
  check_says(error("codec:\n  name: rtn\n  transform: [hadamrd]\n"),
             "s.yaml:4:15: codec.transform[0]: transform 'hadamrd'");
  check_says(error("codec:\n  name: rtn\n  overrides:\n    - {layers: [0], set: {bits: 99}}\n"),
             "s.yaml:5:21: codec.overrides[0].set.k.bits: expected an integer");
  check_says(error("codec:\n  name: rtn\n  overrides:\n    - {layers: [0], set: {v.bits: 99}}\n"),
             "s.yaml:5:27: codec.overrides[0].set.v.bits: expected an integer");
  check_says(error("codec:\n  name: rtn\n  overrides:\n    - {layers: [7], set: {bits: 2}}\n"),
             "s.yaml:5:8: codec.overrides[0].layers: 7 is out of range");
  check_says(error("codec: {name: rtn}\ncache:\n  window: 0\n  policy: streaming\n"),
             "s.yaml:4:3: cache.window: expected 1");
  check_says(error("codec: {name: rtn}\ncache:\n  policy:\n    name: h2o\n    heavy: 1.5\n"),
             "s.yaml:6:5: cache.policy.heavy: expected a fraction");
  // The path is said once, and so is the place; what an override wrote stands on the command line, whatever the file
  // says beside it.
  for (const auto& [override_, message] :
       {std::pair{"codec.bits=99", "codec.bits: expected an integer"},
        {"codec.bist=3", "codec: unknown key 'bist', did you mean 'bits'?"},
        {"codec.name=rtm", "codec.name: codec 'rtm' is not known, did you mean 'rtn'?"},
        {"codec.k.name=rtm", "codec.k.name: codec 'rtm'"},
        {"codec.preset=fast", "codec.preset: of codec 'rtn': 'fast' is not known"},
        {"codec.transform=[hadamrd]", "codec.transform[0]: transform 'hadamrd'"},
        {"codec.transform.0.name=hadamrd", "codec.transform[0].name: transform 'hadamrd'"},
        {"cache.policy=h20", "cache.policy: policy 'h20' is not known, did you mean 'h2o'?"},
        {"cache.policy.name=h20", "cache.policy.name: policy 'h20'"},
        {"cache.k.rule=none", "cache.k.rule: none holds for both roles or for neither, and cache.v.rule is window"},
        {"cache.policy={name: snapkv, observe: 64, interval: 32}",
         "cache.policy.observe: expected at most the 32 tokens of cache.policy.interval, found 64"},
        {"metrics=[key_nms]", "metrics: metric 'key_nms'"}})
    for (const char* file :
         {"codec: {name: rtn, transform: [{name: center}]}\ncache: {window: 16, policy: {name: all}}\n",
          "codec: {name: rtn, transform: [{name: center}], k: {share: none}}\n"
          "cache: {k: {window: 16}, v: {window: 16}, policy: {name: all}}\n"}) {
      Config c = parse_yaml(fmt::format("trace: {{path: {}, train: [0], report: [3]}}\n{}", trace, file), "s.yaml");
      apply_override(c, override_);
      CHECK_THAT(error_of([&] { make_plan(c); }), Catch::StartsWith(fmt::format("command line: {}", message)));
    }
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
  std::vector<Json> one_by_one;
  CHECK(read_plan(path, [&](Json&& cell) { one_by_one.push_back(std::move(cell)); }) == unhashed.header);
  CHECK(one_by_one == plan.cells);
  const std::string good = plan_text(plan);
  const auto refuse = [&](std::string text) {
    write_file(path, text);
    return error_of([&] { read_plan(path); }, ErrorKind::kBadData);
  };
  std::string edited = good;
  edited.replace(edited.find("\"seed\":0"), 8, "\"seed\":1");
  check_says(refuse(edited), "plan again instead of editing");
  edited = good;
  edited.replace(edited.find("\"axes\":{\"codec.bits\":2", edited.find('\n')), 22, "\"axes\":{\"codec.bits\":7");
  check_says(refuse(edited), "lines were changed after planning");
  check_says(refuse(good.substr(0, good.size() - 20)), "unfinished");
  check_says(refuse(good.substr(0, good.rfind('\n', good.size() - 2) + 1)), "added or removed");
  check_says(refuse("{}\n"), "not a plan");
  check_says(refuse("[1]\n"), "JSON object");
  check_says(refuse(""), "not a plan");
  check_says(refuse("{\"plan_version\":99}\n"), "version 99");
  // What a line lacks is named with its place, whatever it is.
  const auto without = [&](size_t line, const char* key, const Json& instead = {}) {
    Plan cut = plan;
    cut.header.erase("content_xxh3");
    Json& of = line == 0 ? cut.header : cut.cells[line - 1];
    of.erase(key);
    if (!instead.is_null()) of[key] = instead;
    return refuse(plan_text(cut));
  };
  for (const char* key : {"plan", "skipped", "axes", "repeats", "traces"})
    check_says(without(0, key), fmt::format("{} line 1: '{}' is missing; ", path, key));
  for (const char* key :
       {"cell", "id", "group", "train_id", "trace", "model", "config", "versions", "axes", "repeat", "index"})
    check_says(without(2, key), fmt::format("{} line 3: '{}' is missing; ", path, key));
  CHECK(without(3, "cell", 3) == path + " line 4: 'cell' must be text");
  CHECK(without(3, "axes", "a") == path + " line 4: 'axes' must be a map");
  CHECK(without(0, "traces", Json::array({1})) == path + " line 1: 'traces' must be a list of maps");

  const Plan other = make_plan(sweep_config(trace, "seed: 3\nsweep: {grid: {codec.bits: [2, 4, 8]}}\n"));
  const std::string difference = plan_difference(plan, other);
  check_says(difference, "0 cells in both, 3 only in the store's plan, 3 only in the new one");
  check_says(difference, "seed: 0 in the store, 3 in the new plan");
}

TEST_CASE("conflicts of codec, cache and trace are found before anything is trained, and have a line",
          "[plan][tiers]") {
  const TestFolder dir;
  const std::string trace = dir / "a.trace.h5";
  write_sweep_trace(trace);
  const auto config = [&](const std::string& rest) {
    return parse_yaml(fmt::format("trace: {{path: {}, train: [0], report: [3]}}\n{}", trace, rest), "s.yaml");
  };
  const std::string tiers =
      "codec:\n  tiers:\n    - {name: rtn, group: 16, tokens: 24}\n    - {name: rtn, group: 16}\n";
  struct Case {
    std::string rest, message;
  };
  for (const auto& [rest, message] :
       {Case{tiers + "cache: {flush: 16}\n",
             "s.yaml:4:30: codec.tiers[0].tokens: 24 is not a multiple of 16, the flush of cache.k"},
        Case{tiers + "cache: {k: {flush: 8}, v: {flush: 16}}\n",
             "s.yaml:4:30: codec.tiers[0].tokens: 24 is not a multiple of 16, the flush of cache.v"},
        Case{"codec: {name: kivi, group: 16}\ncache:\n  window: 16\n  k: {flush: 24}\n",
             "s.yaml:5:3: cache.k: flush 24 is not a multiple of the 16 tokens that codec 'kivi' codes together"},
        Case{"codec:\n  name: rtn\n  heads: 3\n", "s.yaml:2:1: codec: units of 3 heads don't divide 2 KV heads"},
        Case{"codec: {tiers: [{tokens: 64, name: rvq, codebooks: 2, bits: 3},\n  {level: 2}]}\n",
             "s.yaml:3:3: codec.tiers[1]: level 2 of codec 'rvq', layer 0, role k: it has 2 stages"}}) {
    INFO(rest);
    CHECK(error_of([&] { make_cell(config(rest)); }).rfind(message, 0) == 0);
    const Plan plan = make_plan(config(rest));
    REQUIRE(plan.cells.size() == 1);
    REQUIRE(plan.cells[0].contains("skip"));
    CHECK(plan.cells[0]["skip"].get<std::string>().rfind(message, 0) == 0);
  }
  // A rule and a policy that no sweep measures have theirs.
  const auto skip = [&](const std::string& rest) { return make_plan(config(rest)).cells.at(0)["skip"]; };
  check_says(skip("codec: {name: rtn, group: 16}\ncache:\n  policy: h2o\n"), "s.yaml:4:3: cache.policy h2o");
  check_says(skip("codec: {name: exact}\nmetrics: [key_nmse]\ncache: {policy: streaming}\n"),
             "s.yaml:3:1: metrics: key_nmse: of decoded rows alone, and the policy streaming keeps none");
  check_says(skip("codec: {name: rtn, group: 16}\nsweep:\n  skip:\n    - {codec.group: 16}\n"),
             "s.yaml:5:7: sweep.skip[0] matches");
  // What was changed on the command line is said to be from there.
  Config changed = config(tiers + "cache: {flush: 8}\n");
  apply_override(changed, "codec.tiers.0.tokens=12");
  check_says(error_of([&] { make_cell(changed); }), "command line: codec.tiers[0].tokens: 12 is not a multiple of 8");
  const CacheShape shape = TraceReader(trace).info().shape;
  const Config untraced = parse_yaml(tiers + "cache: {flush: 16}\n", "c.yaml");
  check_says(error_of([&] { make_untraced_cell(untraced, shape, "m"); }), "c.yaml:3:30: codec.tiers[0].tokens: 24");
}
