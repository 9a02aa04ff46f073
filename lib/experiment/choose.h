// Choosing under a byte budget. Choices are made on select documents, and shown with the report documents' numbers.
#pragma once
#include <string>
#include <vector>

#include "experiment/result_set.h"

namespace vqkv {

struct Budget {
  double limit = 0;
  bool bytes = false;  // else bits a value
};
// "2.5bpv", "512MiB", "64KiB", "1GiB", "1000B".
Budget parse_budget(const std::string& text);

struct ChooseOptions {
  Budget budget;
  std::string by = "attention.softmax_kl";
  std::string column = "resident";  // resident | shared | codes (bits a value only): what the budget limits
  int64_t context = 0;              // 0: the longest that the cells have
  int64_t sequences = 1;            // that share the constants, for column shared
};

// One configuration: the cells of a repeat group together.
struct Choice {
  std::vector<const CellResult*> cells;
  double cost = 0;    // in the budget's unit
  double select = 0;  // mean over the repeats
  double report = 0;
  double report_error = 0;  // standard error over the documents; NaN for one
  double spread = 0;        // standard deviation over the repeats; 0 for one
  int64_t n = 0;            // report documents
};

// What fits, best first. kUsage when the metric was not measured (nearest name) or the plan has no select documents.
std::vector<Choice> choose(const ResultSet& results, const ChooseOptions& options);
// The context that `choose` uses for 0.
int64_t longest_context(const ResultSet& results);

}  // namespace vqkv
