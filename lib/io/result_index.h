// What a sweep's records are read through afterwards: results.sqlite (an index, always rebuildable) and results.csv
// (long form, one line a measurement, the configuration's paths as columns).
#pragma once
#include <string>
#include <vector>

#include "core/json.h"

namespace vqkv {

// Every leaf of a map by its path: {"codec": {"bits": 4}} -> {"codec.bits": 4}. Lists are leaves.
Json flatten_paths(const Json& tree);

// Both files appear complete or not at all. `records` in plan order, as the runner writes them.
void write_result_csv(const std::string& path, const std::vector<Json>& records);
void write_result_sqlite(const std::string& path, const std::vector<Json>& records, const Json& plan_header);

}  // namespace vqkv
