// What `explain` says of a configuration.
#include "experiment/explain.h"

#include <fmt/format.h>

#include "support/catch.h"
#include "support/sweep_trace.h"

using namespace vqkv;

TEST_CASE("explain tells the bits of the layers that are chosen", "[explain]") {
  const TestFolder dir;
  const std::string trace = dir / "t.trace.h5";
  write_sweep_trace(trace, 1, 40, 4, 1, 64);
  const auto bits = [&](const std::string& layers) {
    const Json told = explain_configuration(parse_yaml(
        fmt::format("trace: {{path: {}, report: [0]}}\ncodec: {{name: qjl, initial_layers: 2, k: {{outliers: "
                    "0}}}}\ncache: {{sinks: 0, window: 32, flush: 32}}\nlayers: {}\n",
                    trace, layers),
        "s.yaml"));
    return told.at("tiers").at(0).at("bits_per_value").get<double>();
  };
  CHECK(bits("[0, 1]") == 4 + 16.0 / 64);
  CHECK(bits("[2, 3]") == 2 + 16.0 / 64);
  CHECK(bits("all") == 3 + 16.0 / 64);
  CHECK_THROWS_WITH(bits("[4]"), Catch::Contains("s.yaml:4:") && Catch::Contains("which has layers 0 to 3"));
}
