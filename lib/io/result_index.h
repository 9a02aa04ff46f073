// What a sweep's records are read through afterwards: results.sqlite (an index, always rebuildable) and results.csv
// (long form, one line a measurement, the configuration's paths as columns).
#pragma once
#include <functional>
#include <set>
#include <string>

#include "core/json.h"

namespace vqkv {

// Every leaf of a map by its path: {"codec": {"bits": 4}} -> {"codec.bits": 4}. Lists are leaves.
Json flatten_paths(const Json& tree);

// Calls its argument with each record, in plan order and as the runner writes them, with `protocol`, which tokens stood
// exact in words, beside; holds one at a time in memory.
using RecordSource = std::function<void(const std::function<void(const Json&)>&)>;

// Adds the columns of a configuration: of a record, or of the line of the plan that it belongs to.
void add_config_columns(const Json& cell, std::set<std::string>& columns);

// Both files appear complete or not at all. config_columns: of all records.
void write_result_csv(const std::string& path, const std::set<std::string>& config_columns,
                      const RecordSource& records);
void write_result_sqlite(const std::string& path, const RecordSource& records, const Json& plan_header);

}  // namespace vqkv
