// Cells that differ in nothing that training reads share one.
#include <filesystem>
#include <map>
#include <set>
#include <thread>

#include "experiment/result_set.h"
#include "experiment/runner.h"
#include "experiment/small_plan.h"
#include "support/catch.h"
#include "support/error_of.h"

using namespace vqkv;

TEST_CASE("cells that share a training train once, in lanes and in shards that keep their codecs", "[runner]") {
  const TestFolder dir;
  const std::string trace = dir / "a.trace.h5";
  write_sweep_trace(trace);
  const Plan plan = small_plan(trace,
                               "codec: {name: rvq, codebooks: 2, bits: 4, iterations: 8, heads: 2}\n"
                               "sweep: {grid: {trace.queries: [1, 2, 3, 4, 5, 6, 7, 8], seed: [1, 2]}}\n",
                               "cache: {sinks: 4, window: 16, flush: 16}\n");
  const Threads t(4);
  // Seconds of training differ from one training to the next.
  const auto check_shared = [&](const std::string& folder) {
    const ResultSet results = load_results(folder);
    REQUIRE(results.cells.size() == 16);
    std::map<std::string, double> seconds;
    for (const auto& c : results.cells) {
      INFO(c.id() << " " << c.reason());
      REQUIRE(c.status() == "ok");
      const double s = c.value("time", "time.train");
      const auto [it, fresh] = seconds.emplace(c.cell.at("train_id").get<std::string>(), s);
      CHECK(it->second == s);
    }
    CHECK(seconds.size() == 2);
  };
  for (const bool keep : {false, true}) {
    RunOptions options;
    options.folder = dir / (keep ? "kept" : "lanes");
    options.jobs = 4;
    options.keep_codecs = keep;
    CHECK(run_plan(plan, options).ok == 16);
    check_shared(options.folder);
  }
  const auto shard = [&](int i) {
    RunOptions options;
    options.folder = dir / "shards";
    options.keep_codecs = true;
    options.shards = 4;
    options.shard = i;
    options.writer = fmt::format("shard-{}-of-4", i);
    run_plan(plan, options);
  };
  std::vector<std::thread> running;
  for (int i = 0; i < 4; ++i) running.emplace_back(shard, i);
  for (auto& r : running) r.join();
  check_shared(dir / "shards");
}

TEST_CASE("cells that differ only in the tokens or levels of tiers share one training and keep their own numbers",
          "[runner][tiers]") {
  const TestFolder dir;
  const std::string trace = dir / "a.trace.h5";
  write_sweep_trace(trace);
  // More values than trainings that a run keeps in memory, and one tier among them.
  const char* codecs[] = {
      "{name: rvq, codebooks: 3, bits: 4, iterations: 4}",
      "{tiers: [{tokens: 16, name: rvq, codebooks: 3, bits: 4, iterations: 4}, {level: 1}]}",
      "{tiers: [{tokens: 48, name: rvq, codebooks: 3, bits: 4, iterations: 4}, {level: 1}]}",
      "{tiers: [{tokens: 16, name: rvq, codebooks: 3, bits: 4, iterations: 4}, {level: 2}]}",
      "{tiers: [{tokens: 16, name: rvq, codebooks: 3, bits: 4, iterations: 4}, {tokens: 16, level: 2}, {level: 1}]}"};
  const auto planned = [&](const std::string& list) {
    return small_plan(trace, "sweep: {grid: {codec: [" + list + "]}}\n",
                      "cache: {sinks: 4, window: 16, flush: 16}\ncontexts: [128]\nlayers: [1]\n");
  };
  std::string list;
  std::map<std::string, std::string> alone;
  for (const char* codec : codecs) {
    RunOptions options;
    options.folder = dir / std::to_string(alone.size());
    REQUIRE(run_plan(planned(codec), options).ok == 1);
    Json record = comparable(load_results(options.folder).cells[0].record);
    alone[record.at("cell").get<std::string>()] = record.at("measurements").dump();
    list += fmt::format("{}{}", list.empty() ? "" : ", ", codec);
  }
  REQUIRE(alone.size() == std::size(codecs));
  for (const bool keep : {false, true}) {
    RunOptions options;
    options.folder = dir / (keep ? "kept" : "together");
    options.keep_codecs = keep;
    REQUIRE(run_plan(planned(list), options).ok == static_cast<int64_t>(alone.size()));
    std::set<double> seconds;
    for (const auto& c : load_results(options.folder).cells) {
      seconds.insert(c.value("time", "time.train"));
      CHECK(comparable(c.record).at("measurements").dump() == alone.at(c.cell.at("cell").get<std::string>()));
      if (keep) CHECK(codecs_of_cell(c.cell, nullptr, options.folder)->config() == c.cell.at("config").at("codec"));
    }
    CHECK(seconds.size() == 1);
  }
  // A kept file that is cut is named, and what to do about it.
  for (const auto& file : std::filesystem::directory_iterator(dir / "kept/codecs"))
    if (file.path().extension() == ".h5") std::filesystem::resize_file(file, file.file_size() / 2);
  const Json cell = load_results(dir / "kept").cells[0].cell;
  CHECK_THAT(error_of([&] { codecs_of_cell(cell, nullptr, dir / "kept"); }, ErrorKind::kBadData),
             Catch::Contains("are trained anew"));
}
