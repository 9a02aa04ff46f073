// What a store holds, in plan order: the input of status, merge, best and report.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "core/json.h"
#include "experiment/plan.h"
#include "io/record_index.h"
#include "metric/measurement.h"

namespace vqkv {

// A cell of the plan with its last record. Fields of a record: docs/formats.md. Its measurements carry a `role`:
//   "select" and "report"  a metric over the documents of that role; tables show "report", choices are made on "select"
//   "cost"                 bytes and bits from the ledger; `context` and, where constants are shared, `sequences`
//   "time"                 seconds; never part of a comparison of two stores
struct CellResult {
  Json cell;        // line of the plan; with kStatus of it {cell, id, axes, repeat} alone
  Json record;      // null while the cell is pending
  size_t file = 0;  // of ResultSet::files, where the whole record stands
  RecordPlace place = {};
  std::string id() const;      // short id
  std::string status() const;  // ok | failed | skipped | pending
  std::string reason() const;
  bool flagged(const std::string& flag) const;  // "extrapolated", "undertrained", …: docs/footguns.md
  // The measurement, or null. context and sequences 0: any (the first).
  const Json* find(const std::string& role, const std::string& tag, int64_t context = 0, int64_t sequences = 0) const;
  // NaN when absent.
  double value(const std::string& role, const std::string& tag, int64_t context = 0, int64_t sequences = 0) const;
};

struct ResultSet {
  std::string folder;
  Json plan;                          // header line of the plan
  std::vector<CellResult> cells;      // in plan order
  std::vector<std::string> files;     // of records
  std::vector<std::string> problems;  // unfinished lines, records of cells that the plan does not have
  int64_t count(const std::string& status) const;
};

// kStatus: each record holds only its status, attempt, reason and flags, which the index of the records gives, and
// little is kept of the cells: of a hundred thousand the plan's lines alone would be a gigabyte.
enum class Records { kWhole, kStatus };

// Reads FOLDER/plan.jsonl and FOLDER/results/*.jsonl. Of several records of a cell an ok one wins, else the last
// attempt; the others are not read. kBadData with file and line for a record, and where it is read whole for a
// measurement, with a field that is missing or of another kind.
ResultSet load_results(const std::string& folder, Records records = Records::kWhole);
// The same for who holds the store's plan already.
ResultSet load_results(const std::string& folder, const Plan& plan, Records records);
// The plan's lines of all cells in order, one at a time in memory, from the store's own plan.
void for_each_planned(const ResultSet& results, const std::function<void(size_t cell, Json&& line)>& body);
// The whole records of the cells that have one, in plan order, one at a time in memory.
void for_each_record(const ResultSet& results, const std::function<void(size_t cell, Json&& record)>& body);

}  // namespace vqkv
