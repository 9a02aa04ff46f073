// What a store holds, in plan order: the input of status, merge, best and report.
#pragma once
#include <string>
#include <vector>

#include "core/json.h"
#include "metric/measurement.h"

namespace vqkv {

// A cell of the plan with its last record. Fields of a record: docs/formats.md. Its measurements carry a `role`:
//   "select" and "report"  a metric over the documents of that role; tables show "report", choices are made on "select"
//   "cost"                 bytes and bits from the ledger; `context` and, where constants are shared, `sequences`
//   "time"                 seconds; never part of a comparison of two stores
struct CellResult {
  Json cell;                   // line of the plan
  Json record;                 // null while the cell is pending
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
  std::vector<std::string> problems;  // unfinished lines, records of cells that the plan does not have
  int64_t count(const std::string& status) const;
};

// Reads FOLDER/plan.jsonl and FOLDER/results/*.jsonl. Of several records of a cell an ok one wins, else the last
// attempt.
ResultSet load_results(const std::string& folder);

}  // namespace vqkv
