// One sweep with the real binaries: at one and two threads, in one and three shards, killed and resumed. The same
// numbers, and the same codec parameters, bit for bit.
#pragma once
#include <fmt/format.h>
#include <signal.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <thread>

#include "experiment/result_set.h"
#include "experiment/runner.h"
#include "support/catch.h"
#include "support/run_tool.h"

namespace vqkv::test {

inline ToolRun succeed(const std::string& tool, const std::string& folder, const std::vector<std::string>& arguments) {
  const ToolRun r = run_tool_of_build(tool, folder, arguments);
  INFO(fmt::format("{} {}\n{}", tool, fmt::join(arguments, " "), r.err));
  REQUIRE(r.code == 0);
  return r;
}

// The content hash of a trace of `model`, captured with so many threads.
inline std::string capture_hash(const std::string& folder, const std::string& trace, int threads,
                                std::vector<std::string> input) {
  input.insert(input.begin(), "capture");
  input.insert(input.end(), {"--threads", std::to_string(threads), "-o", trace, "-q"});
  succeed("vqkv-dump", folder, input);
  const Json row = Json::parse(succeed("vqkv-dump", folder, {"verify", trace, "--json", "-q"}).out).at(0);
  CHECK(row.at("ok") == true);
  return row.at("content_xxh3");
}

// Records in plan order, without times and provenance.
inline std::vector<std::string> records_of(const std::string& results) {
  std::vector<std::string> out;
  for (const CellResult& c : load_results(results).cells) {
    INFO(results << ": cell " << c.id() << " " << c.status() << " " << c.reason());
    CHECK(c.status() == "ok");
    out.push_back(c.record.is_null() ? "" : comparable(c.record).dump());
  }
  return out;
}

inline void check_sweep_sameness(const std::string& folder, const std::string& plan) {
  const auto run = [&](const std::string& name, const std::vector<std::string>& more) {
    std::vector<std::string> arguments{"run", plan, "-o", folder + "/" + name, "-q"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return arguments;
  };
  succeed("vqkv-sweep", folder, run("one", {"--threads", "1"}));
  const std::vector<std::string> expected = records_of(folder + "/one");
  REQUIRE(expected.size() >= 3);  // one for each of three shards

  succeed("vqkv-sweep", folder, run("two", {"--threads", "2"}));
  CHECK(records_of(folder + "/two") == expected);

  for (const char* shard : {"2/3", "0/3", "1/3"})
    succeed("vqkv-sweep", folder, run("shards", {"--shard", shard, "--threads", "2"}));
  CHECK(records_of(folder + "/shards") == expected);

  // kill -9 once the first cell is on disk, so that the next one is under way.
  const std::vector<std::string> command = run("killed", {"--threads", "2"});
  const std::string records = folder + "/killed/results/main.jsonl";
  const pid_t child = start_tool("vqkv-sweep", folder, command);
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::minutes(10);
  const auto lines = [&] {
    const std::string text = text_of(records);
    return std::count(text.begin(), text.end(), '\n');
  };
  while (lines() < 1 && std::chrono::steady_clock::now() < deadline)
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  kill(child, SIGKILL);
  const ToolRun killed = finish_tool(folder, child);
  INFO(killed.err);
  CHECK(killed.code == 128 + SIGKILL);
  const int64_t before = load_results(folder + "/killed").count("ok");
  CHECK(before >= 1);
  CHECK(before < static_cast<int64_t>(expected.size()));
  succeed("vqkv-sweep", folder, command);
  CHECK(records_of(folder + "/killed") == expected);
}

}  // namespace vqkv::test
