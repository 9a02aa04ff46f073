// Every committed configuration plans, and its `test` group runs in seconds.
#include <fmt/format.h>

#include <algorithm>
#include <filesystem>

#include "experiment/result_set.h"
#include "experiment/runner.h"
#include "support/catch.h"
#include "support/sweep_trace.h"

using namespace vqkv;

namespace {
std::vector<std::string> yaml_files(const std::string& folder) {
  std::vector<std::string> out;
  for (const auto& f : std::filesystem::directory_iterator(std::string(VQKV_SOURCE_DIR) + "/configs/" + folder))
    if (f.path().extension() == ".yaml") out.push_back(f.path().string());
  std::sort(out.begin(), out.end());
  return out;
}
}  // namespace

TEST_CASE("the test group of every configuration runs", "[configs]") {
  const TestFolder dir;
  const std::string trace = dir / "t.trace.h5";
  // Queries of every token, for what is fitted to those of a prompt; the metrics take fewer.
  write_sweep_trace(trace, 7, 288, 16, 1, 64, 1, 0, nullptr, {}, 1);
  for (const char* folder : {"codecs", "sweeps"}) {
    const auto files = yaml_files(folder);
    REQUIRE_FALSE(files.empty());
    for (const auto& file : files) {
      INFO(file);
      Config config = load_config(file);
      for (const std::string& o :
           {"trace.path=" + trace, std::string("trace.train=[0, 1, 2, 3]"), std::string("trace.select=[4]"),
            std::string("trace.report=[5, 6]"), std::string("trace.queries=36"), std::string("layers=[0, 15]")})
        apply_override(config, o);
      const Plan whole = make_plan(config);
      for (const auto& c : whole.cells) CHECK_FALSE(c.contains("skip"));
      if (folder == std::string("sweeps"))
        CHECK(whole.cells.back().at("config").at("cache").at("policy").at("name") == "streaming");
      apply_override(config, "group=test");
      const Plan plan = make_plan(config);
      RunOptions options;
      options.folder = dir / std::filesystem::path(file).stem().string();
      const RunSummary s = run_plan(plan, options);
      CHECK(s.failed == 0);
      CHECK(s.ok == static_cast<int64_t>(plan.cells.size()));
    }
  }
}
