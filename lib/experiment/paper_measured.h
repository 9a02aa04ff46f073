// Numbers that our tools measured, held against the conditions of a paper's.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "cache/policy.h"
#include "experiment/paper_tables.h"

namespace vqkv {

// One number of a result file, with what it was measured under.
struct MeasuredNumber {
  std::string quantity;            // of quantities()
  double value = 0;                // in its unit
  std::optional<double> of_exact;  // the exact cache's beside it, in the same file
  bool exact_cache = false;        // it is the exact cache's own
  std::string codec;               // the row's label
  Json config;                     // canonical codec section
  CachePolicy policy;              // sinks and flush rules alone
  std::string model, mode, strategy;
  std::vector<std::string> texts;  // names of files
  int64_t context = 0;             // tokens a window; 0: there are none
  int64_t tokens = 0;              // of the prompt; 0: there is none
  std::vector<std::string> notes;  // why it is no row's own number: flags, a part of the texts, a temperature
  std::string file, command;

  Json to_json() const;
};

// What `vqkv-eval replay` and `strategy` write with --json. kBadData for a file that is neither, led by its name.
std::vector<MeasuredNumber> read_measured(const std::string& path);

// Whether a measured number is of a row's method, settings, bits and metric at all; then the conditions of the row that
// it does not meet, in words. Empty: it stands in the row as the row's own. Unconfirmed conditions are never met.
std::optional<std::vector<std::string>> unmet_conditions(const PaperNumber& row, const MeasuredNumber& measured);

}  // namespace vqkv
