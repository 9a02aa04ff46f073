// The real vqkv-eval over the real small model: what it prints.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "core/json.h"
#include "io/atomic_file.h"
#include "support/eval_tool.h"

using namespace vqkv;

TEST_CASE("vqkv-eval: help, version, what there is", "[cli][eval]") {
  const Eval eval;
  CHECK(eval({"--version"}).out.rfind("vqkv-eval 0.", 0) == 0);
  CHECK(eval({"--help"}).code == 0);
  for (const char* verb : {"replay", "generate", "strategy", "memory", "speed", "ls"}) {
    const ToolRun r = eval({verb, "--help"});
    CHECK(r.code == 0);
    CHECK(r.out.find("Examples:") != std::string::npos);
    CHECK(r.out.find("child") == std::string::npos);  // the hidden flag
  }
  const Json modes = eval.json({"ls", "modes"});
  CHECK(modes.size() == 4);
  const std::string help = eval({"replay", "--help"}).out;
  for (const Json& m : modes) CHECK(help.find(m["meaning"].get<std::string>()) != std::string::npos);
  // Rules and policies are two keys of `cache:`, listed apart, by both tools alike.
  for (const auto& [what, names] : {std::pair("rules", Json{"window", "kivi", "residual", "none"}),
                                    std::pair("policies", Json{"all", "h2o", "snapkv", "streaming"})}) {
    const Json rows = eval.json({"ls", what});
    std::vector<std::string> found;
    for (const Json& row : rows) found.push_back(row["name"]);
    std::sort(found.begin(), found.end());
    std::vector<std::string> expected = names;
    std::sort(expected.begin(), expected.end());
    CHECK(found == expected);
    CHECK(Json::parse(run_tool_of_build("vqkv-sweep", eval.dir.path.string(), {"ls", what, "--json"}).out) == rows);
  }
  const ToolRun backends = eval({"ls", "backends", "--format", "csv"});
  CHECK(backends.out.rfind("name\n", 0) == 0);
  CHECK(backends.out.find("\nreference\n") != std::string::npos);
}

TEST_CASE("vqkv-eval replay: rows, statistics, comparisons, the override of a frozen cache", "[cli][eval]") {
  const Eval eval;
  const std::string out = eval.dir / "r.json";
  const Json r = eval.json({"replay", "--model", kModel, "--codec", eval.codec, "--codec", "exact", "--text", kText,
                            "--context", "96", "--windows", "2", "-o", out, "cache.window=32"});
  CHECK(Json::parse(text_of(out))["rows"] == r["rows"]);
  CHECK(r["facts"]["windows"] == 2);
  CHECK(r["facts"]["positions"] == 2 * 95);
  CHECK(r["facts"]["bos"] == false);
  REQUIRE(r["rows"].size() == 5);
  const Json &noise = r["rows"][0], &window = r["rows"][1], &bare = r["rows"][2], &exact = r["rows"][3],
             &streaming = r["rows"][4];
  CHECK(noise["codec"].get<std::string>().rfind("self-noise", 0) == 0);
  CHECK(noise["kld.mean"] > 0);
  CHECK(noise["kld.mean"] < 1e-5);
  CHECK(window["codec"] == "rtn4");
  for (const Json& row : r["rows"]) CHECK(row["path"] == "cpu-reconstruct");  // what ran, never "auto"
  CHECK(r["facts"]["exact_path"] == "cpu-reconstruct");
  CHECK(noise["protocol"] == "everything exact");
  CHECK(window["protocol"].get<std::string>().starts_with("window 32"));
  CHECK(bare["protocol"].get<std::string>().starts_with("no exact token but its own"));
  CHECK(window["cache"]["k"]["window"] == 32);
  CHECK(window["kld.mean"] > noise["kld.mean"]);
  CHECK(bare["codec"] == "rtn4 (no window)");
  CHECK(bare["cache"]["k"]["window"] == 1);
  CHECK(noise["cache"] == Json({{"exact_dtype", "f32"}, {"rule", "none"}}));
  CHECK(streaming["cache"]["policy"] == "streaming");
  CHECK(bare["kld.last_quarter"] > window["kld.last_quarter"]);
  CHECK(bare["coded_mass.last_quarter"] > window["coded_mass.last_quarter"]);
  CHECK(exact["kld.max"] == 0);
  // What the window of rtn4 does alone.
  CHECK(streaming["codec"] == "streaming");
  CHECK(streaming["protocol"].get<std::string>() == window["protocol"].get<std::string>() + ", nothing else");
  CHECK(streaming["kld.last_quarter"] > window["kld.last_quarter"]);
  CHECK(streaming["coded_mass.last_quarter"] == 0);
  CHECK(streaming["bytes"]["codes"] == 0);
  CHECK(exact["bits_per_value"].get<double>() > 16);
  CHECK(window["time_ratio"] > 0);
  CHECK(window["buckets"].size() == 4);
  REQUIRE(window["per_document"]["kld.last_quarter"].size() == 1);  // one document
  const double alone = window["per_document"]["kld.last_quarter"][0], all = window["kld.last_quarter"];
  CHECK(std::abs(alone / all - 1) < 1e-12);
  CHECK(window["config"]["k"]["bits"] == 4);
  REQUIRE(r["comparisons"].size() == 3);  // one pair of windowed rows, three measures
  for (const Json& c : r["comparisons"]) {
    CHECK(c["clusters"] == 2);  // windows of one document: far too few, and the row says so
    CHECK(c["cluster"] == "window");
    CHECK(c["clusters_needed"] == 7);
    CHECK(c["low"].is_null());
    CHECK(c["told_apart"].is_null());
    CHECK(c["verdict"] == "no verdict: 2 windows can't reach 5 % over these comparisons, 7 would do");
  }

  const ToolRun table = eval(
      {"replay", "--model", kModel, "--codec", "exact", "--text", kText, "--context", "128", "--windows", "1", "-q"});
  CHECK(table.code == 0);
  CHECK(table.out.rfind("| codec", 0) == 0);
  CHECK(table.out.find("every token of a window but its first") != std::string::npos);
  CHECK(table.out.find("no BOS, as the model adds none") != std::string::npos);
}

TEST_CASE("vqkv-eval replay: a cell trained on the spot is the codec", "[cli][eval]") {
  const Eval eval;
  const std::string trace = eval.dir / "t.trace.h5";
  REQUIRE(run_tool_of_build(
              "vqkv-dump", eval.dir.path.string(),
              {"capture", "--model", kModel, "--text", VQKV_SOURCE_DIR "/data/jargon-0.txt", "--text",
               VQKV_SOURCE_DIR "/data/jargon-1.txt", "--context", "128", "--max-tokens", "256", "-o", trace, "-q"})
              .code == 0);
  const std::string cell = eval.dir / "pq.yaml";
  write_file(cell,
             fmt::format("trace: {{path: {}, train: [0], report: [1]}}\ncache: {{sinks: 4, window: 16, flush: 16}}\n"
                         "codec: {{name: pq, codebooks: 16, bits: 4, iterations: 2}}\n",
                         trace));
  const Json r = eval.json({"replay", "--model", kModel, "--codec", cell, "--text", kText, "--context", "128",
                            "--windows", "1", "--skip-no-window", "codec.bits=5"});
  REQUIRE(r["rows"].size() == 3);
  CHECK(r["rows"][1]["codec"] == "pq");
  CHECK(r["rows"][2]["codec"] == "streaming");
  CHECK(r["rows"][1]["config"]["k"]["bits"] == 5);
  CHECK(r["rows"][1]["bytes"]["codebooks"] > 0);
  CHECK(r["rows"][1]["bits_per_value_1"] > r["rows"][1]["bits_per_value_64"]);
  CHECK(r["rows"][1]["kld.mean"] > 1e-4);

  CHECK(r["rows"][1]["flags"].empty());

  // Beyond the trained positions, and over the text that it was trained on: the rows say so.
  const ToolRun flagged =
      eval({"replay", "--model", kModel, "--codec", cell, "--text", VQKV_SOURCE_DIR "/data/jargon-0.txt", "--context",
            "160", "--max-tokens", "160", "--skip-no-window", "-q"});
  CHECK(flagged.code == 0);
  CHECK(flagged.out.find("trained on these texts, extrapolated") != std::string::npos);
  CHECK(flagged.err.find("stand in its train documents") != std::string::npos);

  // A trace of another model.
  write_sweep_trace(trace + ".other");
  write_file(cell, fmt::format("trace: {{path: {}, train: [0], report: [1]}}\ncodec: {{name: rtn, group: 16}}\n",
                               trace + ".other"));
  eval.refuses(3, "made for 2 layers", {"replay", "--model", kModel, "--codec", cell, "--text", kText});
}

TEST_CASE("vqkv-eval replay: a cell in which nothing learns needs no trace", "[cli][eval]") {
  const Eval eval;
  const std::string cell = eval.dir / "rtn.yaml", kivi = eval.dir / "kivi.yaml";
  write_file(cell, "codec: {name: rtn, bits: 4}\ncache: {sinks: 4, window: 16, flush: 16}\n");
  write_file(kivi, "codec: {name: kivi, preset: default}\ncache: {rule: kivi, residual: 32}\n");
  const Json rows = eval.json({"replay", "--model", kModel, "--codec", eval.codec, "--codec", cell, "--codec", kivi,
                               "--text", kText, "--context", "128", "--windows", "1", "--skip-no-window"})["rows"];
  REQUIRE(rows.size() == 5);
  CHECK(rows[2]["codec"] == "rtn");
  CHECK(rows[2]["kld.mean"] == rows[1]["kld.mean"]);
  CHECK(rows[3]["codec"] == "kivi");
  for (size_t i = 1; i < 4; ++i) CHECK(rows[i]["flags"] == Json::array());  // whether it was trained is known
  write_file(cell, "codec: {name: rtn, transform: [center]}\n");
  eval.refuses(2, "rtn.yaml:1:1: transform 'center' (role k) learns from a trace, and none is named",
               {"replay", "--model", kModel, "--codec", cell, "--text", kText});
}

TEST_CASE("vqkv-eval generate: exact beside compressed", "[cli][eval]") {
  const Eval eval;
  write_codec(eval.dir / "rtn2.codec.h5", {{"name", "rtn"}, {"bits", 2}}, {{"sinks", 4}, {"window", 1}, {"flush", 1}});
  const Json r = eval.json({"generate", "--model", kModel, "--codec", "exact", "--codec", eval.dir / "rtn2.codec.h5",
                            "--chat", "--prompt", "Tell me about caches.", "--new-tokens", "12"});
  REQUIRE(r["rows"].size() == 3);
  CHECK(r["rows"][0]["tokens"].size() == 12);
  CHECK(r["rows"][1]["tokens"] == r["rows"][0]["tokens"]);
  CHECK(r["rows"][1]["first_divergence"].is_null());
  CHECK(r["rows"][0]["protocol"] == "everything exact");
  CHECK(r["rows"][2]["protocol"] == "no exact token but its own + 4 sinks");
  for (const Json& row : r["rows"]) CHECK(row["path"] == "cpu-reconstruct");
  const Json& d = r["rows"][2]["first_divergence"];
  REQUIRE(d.is_object());
  const size_t at = d["index"].get<size_t>();
  CHECK(d["exact"]["id"] == r["rows"][0]["tokens"][at]);
  CHECK(d["codec"]["id"] == r["rows"][2]["tokens"][at]);
  for (size_t i = 0; i < at; ++i) CHECK(r["rows"][0]["tokens"][i] == r["rows"][2]["tokens"][i]);
  CHECK(r["rows"][2]["coded_mass"] > 0.2);

  // Sampled: the same seed draws the same from the same cache.
  const std::vector<std::string> sampled{"generate", "--model",      kModel, "--codec",       "exact", "--prompt",
                                         "Once",     "--new-tokens", "8",    "--temperature", "1.2",   "--seed",
                                         "5"};
  const Json s = eval.json(sampled);
  CHECK(s["rows"][1]["tokens"] == s["rows"][0]["tokens"]);
  CHECK(s["facts"]["sampling"]["seed"] == 5);
  auto other = sampled;
  other.back() = "6";
  CHECK(eval.json(other)["rows"][0]["tokens"] != s["rows"][0]["tokens"]);

  const ToolRun text =
      eval({"generate", "--model", kModel, "--codec", "exact", "--prompt", "Once upon", "--new-tokens", "8", "-q"});
  CHECK(text.code == 0);
  CHECK(text.out.find("Equal, token for token.") != std::string::npos);
}

TEST_CASE("vqkv-eval memory: the ledger is the allocator", "[cli][eval]") {
  const Eval eval;
  const Json rows =
      eval.json({"memory", "--model", kModel, "--codec", eval.codec, "--context", "100,1k", "--measure-up-to", "200"});
  REQUIRE(rows.size() == 4);
  for (const Json& row : rows) {
    const int64_t total = row["total"].get<int64_t>();
    int64_t sum = 0;
    for (const char* kind : {"codes", "side", "overlay", "sinks", "window", "padding", "index", "workspace"})
      sum += row[kind].get<int64_t>();
    CHECK(sum == total);
    CHECK(row.contains("allocator") == (row["context"] == 100));
    if (!row.contains("allocator")) continue;
    CHECK(row["allocator"] == total);
    CHECK(row["allocator_peak"] >= total);
    CHECK(row["process_peak"] > row["process_loaded"].get<int64_t>() - 1);
    CHECK(row["workspace"] > 0);  // attention's
    CHECK(row["threads"] > 0);
  }
  CHECK(rows[0]["protocol"] == "everything exact");
  CHECK(rows[3]["protocol"].get<std::string>().starts_with("window "));
  CHECK(rows[3]["bits_per_value"] < 7);
  CHECK(rows[1]["bits_per_value"] > 16);
}

TEST_CASE("vqkv-eval: a codec from a file named exact has a row of its own beside the exact cache", "[cli][eval]") {
  const Eval eval;
  const std::string yaml = eval.dir / "exact.yaml", frozen = eval.dir / "exact.codec.h5";
  write_file(yaml, "codec: {name: exact}\ncache: {rule: none, exact_dtype: f32}\n");
  write_codec(frozen, {{"name", "exact"}}, {{"rule", "none"}});
  const Json rows = eval.json({"memory", "--model", kModel, "--codec", "exact", "--codec", yaml, "--codec", frozen,
                               "--context", "100", "--measure-up-to", "200"});
  REQUIRE(rows.size() == 3);
  CHECK(rows[0]["codec"] == "exact");
  CHECK(rows[1]["codec"] == "exact.yaml");
  CHECK(rows[2]["codec"] == "exact.codec.h5");
  // f32 rows are twice those of f16, as stated and as measured.
  CHECK(rows[1]["window"] == 2 * rows[0]["window"].get<int64_t>());
  CHECK(rows[1]["allocator"] == rows[1]["total"]);
  CHECK(rows[2]["total"] == rows[0]["total"]);
}

TEST_CASE("vqkv-eval: a policy that decides by attention replays, generates and is measured", "[cli][eval]") {
  const Eval eval;
  const std::string codec = eval.dir / "h2o.codec.h5";
  write_codec(codec, {{"name", "rtn"}, {"bits", 4}, {"heads", 1}},
              {{"sinks", 4},
               {"window", 16},
               {"flush", 16},
               {"policy", {{"name", "h2o"}, {"heavy", 16}, {"recent", 16}, {"interval", 32}}}});
  const Json r = eval.json({"replay", "--model", kModel, "--codec", eval.codec, "--codec", codec, "--text", kText,
                            "--context", "160", "--windows", "1", "--skip-no-window"});
  REQUIRE(r["rows"].size() == 4);
  const Json &all = r["rows"][1], &h2o = r["rows"][2], &streaming = r["rows"][3];
  CHECK(h2o["protocol"] == all["protocol"].get<std::string>() + ", h2o: heavy 16, recent 16, every 32");
  CHECK(streaming["codec"] == "streaming");
  CHECK(2 * h2o["bytes"]["codes"].get<int64_t>() < all["bytes"]["codes"].get<int64_t>());
  CHECK(h2o["bytes"]["workspace"] > 0);
  CHECK(h2o["kld.mean"] > all["kld.mean"]);
  CHECK(h2o["kld.mean"] < streaming["kld.mean"]);
  // A policy that had no occasion to decide is named in the row all the same, and the row says that it did nothing.
  CHECK(h2o["flags"] == Json::array());
  const Json idle = eval.json({"replay", "--model", kModel, "--codec", eval.codec, "--text", kText, "--context", "128",
                               "--windows", "1", "--skip-no-window", "cache.policy=snapkv"});
  CHECK(idle["rows"][1]["flags"] == Json::array({"policy gave nothing up"}));
  std::string prompt = "One";
  for (int i = 0; i < 90; ++i) prompt += " more";
  const Json g = eval.json({"generate", "--model", kModel, "--codec", codec, "--prompt", prompt, "--new-tokens", "40",
                            "--ignore-stop", "--exact-prefill"});
  CHECK(g["rows"][1]["tokens"].size() == 40);
  const Json rows =
      eval.json({"memory", "--model", kModel, "--codec", codec, "--context", "100,200", "--measure-up-to", "200"});
  REQUIRE(rows.size() == 4);
  CHECK(rows[2]["allocator"] == rows[2]["total"]);
  CHECK(rows[3]["allocator"] == rows[3]["total"]);
  CHECK(rows[3]["codes"] <= rows[2]["codes"].get<int64_t>() * 2);
  // Beyond what is measured nothing is made up.
  const ToolRun longer =
      eval({"memory", "--model", kModel, "--codec", codec, "--context", "1k", "--measure-up-to", "200", "--json"});
  CHECK(longer.code == 0);
  CHECK(Json::parse(longer.out).size() == 1);
  CHECK(longer.err.find("depends on the text") != std::string::npos);
}

TEST_CASE("vqkv-eval speed: the exact cache in the same run", "[cli][eval]") {
  const Eval eval;
  const Json rows = eval.json({"speed", "--model", kModel, "--codec", eval.codec, "--prompt-tokens", "64",
                               "--new-tokens", "4", "--repeats", "1"});
  REQUIRE(rows.size() == 2);
  CHECK(rows[0]["codec"] == "exact");
  CHECK(rows[0]["prefill_ratio"] == 1);
  CHECK(rows[1]["protocol"].get<std::string>().starts_with("window "));
  CHECK(rows[1]["prefill"] > 0);
  CHECK(rows[1]["decode"] > 0);
  CHECK(rows[1]["encode_s"] > 0);
  CHECK(rows[1]["batch"] == 1);
  CHECK(rows[0]["coded"] == 0);
  CHECK(rows[1]["coded"] > 0);
  const ToolRun wide = eval({"speed", "--model", kModel, "--codec", eval.codec, "--prompt-tokens", "16", "--new-tokens",
                             "1", "--repeats", "1", "cache.window=64"});
  CHECK(wide.code == 0);
  CHECK(wide.err.find("none of 17 tokens is coded") != std::string::npos);
  const Json batch = eval.json({"speed", "--model", kModel, "--codec", eval.codec, "--prompt-tokens", "48",
                                "--new-tokens", "4", "--repeats", "1", "--batch", "3"});
  REQUIRE(batch.size() == 2);
  for (const Json& row : batch) {
    CHECK(row["batch"] == 3);
    CHECK(row["decode"] > 0);
  }
  CHECK(batch[0]["decode_ratio"] == 1);
  // Without decode steps there is no decode speed, not one of 0.
  const Json prefill = eval.json({"speed", "--model", kModel, "--codec", eval.codec, "--prompt-tokens", "48",
                                  "--new-tokens", "0", "--repeats", "1"});
  for (const Json& row : prefill) {
    CHECK(row["prefill"] > 0);
    CHECK(row["decode"].is_null());
    CHECK(row["decode_ratio"].is_null());
  }
}
