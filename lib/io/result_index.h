// What a sweep's records are read through afterwards: results.sqlite (an index, always rebuildable) and results.csv
// (long form, one line a measurement, the configuration's paths as columns).
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "core/json.h"

namespace vqkv {

// Every leaf of a map by its path: {"codec": {"bits": 4}} -> {"codec.bits": 4}. Lists are leaves.
Json flatten_paths(const Json& tree);

// Calls its argument with each record, in plan order and as the runner writes them, with `protocol`, which tokens stood
// exact in words, beside; holds one at a time in memory.
using RecordSource = std::function<void(const std::function<void(const Json&)>&)>;

// Both files appear complete or not at all. The columns of the configuration are those of `cells`: the records, or the
// lines of the plan that they belong to.
void write_result_csv(const std::string& path, const std::vector<const Json*>& cells, const RecordSource& records);
void write_result_sqlite(const std::string& path, const RecordSource& records, const Json& plan_header);

}  // namespace vqkv
