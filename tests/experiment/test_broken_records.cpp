// Records of a store that were changed by hand or by another program.
#include <fmt/format.h>

#include <fstream>
#include <functional>

#include "core/error.h"
#include "experiment/result_set.h"
#include "experiment/runner.h"
#include "io/atomic_file.h"
#include "io/store.h"
#include "support/catch.h"
#include "support/error_of.h"
#include "support/sweep_trace.h"

using namespace vqkv;

TEST_CASE("a record that counts nowhere, or with a measurement that can't be read, is refused by file and line",
          "[runner][store]") {
  const TestFolder dir;
  const std::string trace = dir / "a.trace.h5";
  write_sweep_trace(trace);
  RunOptions options;
  options.folder = dir / "out";
  run_plan(
      make_plan(parse_yaml(
          fmt::format("trace: {{path: {}, train: [0], select: [2], report: [3]}}\ncodec: {{name: rtn, group: 16}}\n"
                      "cache: {{sinks: 4, window: 16, flush: 16}}\nsweep: {{grid: {{codec.bits: [2, 4, 8]}}, "
                      "streaming: false}}\n",
                      trace),
          "s.yaml")),
      options);
  const std::string file = options.folder + "/results/main.jsonl";
  const std::vector<Json> sound = parse_jsonl(read_file(file), file).records;
  const auto refused = [&](Records records, const std::function<void(Json&)>& edit) {
    std::ofstream out(file, std::ios::trunc);
    for (size_t i = 0; i < sound.size(); ++i) {
      Json r = sound[i];
      if (i == 1) edit(r);
      out << r.dump() << "\n";
    }
    out.close();
    try {
      load_results(options.folder, records);
    } catch (const Error& e) {
      CHECK(e.kind() == ErrorKind::kBadData);
      CHECK(std::string(e.what()).starts_with(file + " at byte "));
      return std::string(e.what());
    }
    return std::string("no error");
  };
  for (const Records records : {Records::kStatus, Records::kWhole}) {
    CHECK(refused(records, [](Json&) {}) == "no error");
    check_says(refused(records, [](Json& r) { r["status"] = "okay"; }),
               " line 2: 'status' is \"okay\"; allowed: ok, failed, skipped");
    check_says(refused(records, [](Json& r) { r["status"] = 1; }), " line 2: 'status' must be text");
    check_says(refused(records, [](Json& r) { r.erase("status"); }), " line 2: 'status' is missing");
    check_says(refused(records, [](Json& r) { r.erase("cell"); }), " line 2: 'cell' is missing");
    check_says(refused(records, [](Json& r) { r["attempt"] = "1"; }), " line 2: 'attempt' must be an integer");
    check_says(refused(records, [](Json& r) { r["flags"] = {1}; }), " line 2: 'flags' must be a list of texts");
    check_says(refused(records, [](Json& r) { r["status"] = "failed"; }), " line 2: 'reason' is missing");
  }
  const auto measurement = [&](const char* key, const Json& value) {
    return refused(Records::kWhole, [&](Json& r) {
      if (value.is_null())
        r["measurements"][1].erase(key);
      else
        r["measurements"][1][key] = value;
    });
  };
  for (const char* key : {"role", "tag", "value", "unit", "stderr", "n", "better", "exact"})
    check_says(measurement(key, nullptr), fmt::format(" line 2: a measurement: '{}' is missing", key));
  check_says(measurement("value", "much"), " line 2: a measurement: 'value' must be a number, or null");
  check_says(measurement("better", "worse"),
             " line 2: a measurement: 'better' is \"worse\"; allowed: lower, higher, neither");
  check_says(measurement("context", "4k"), " line 2: a measurement: 'context' must be an integer");
  check_says(measurement("details", Json::array({1})), " line 2: a measurement: 'details' must be a list of maps");
  check_says(refused(Records::kWhole, [](Json& r) { r["measurements"][0] = 1; }),
             " line 2: 'measurements' must be a list");
  check_says(refused(Records::kWhole, [](Json& r) { r.erase("measurements"); }), " line 2: 'measurements' is missing");
  CHECK(refused(Records::kStatus, [](Json& r) { r.erase("measurements"); }) == "no error");
}
