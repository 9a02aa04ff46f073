// What a plan will cost, found by running a little of it.
#pragma once
#include <functional>

#include "experiment/plan.h"

namespace vqkv {

struct PlanEstimate {
  double seconds = 0;       // on the threads of this process, one cell after another
  double bytes_read = 0;    // of the trace, a cell
  double bytes_memory = 0;  // of the process at the peak of its largest cell, one cell at a time
  int probed = 0;           // cells whose first layer was trained and measured
};

// One layer of one cell of every pair of methods is run (a second or so each) and scaled to all layers and cells.
PlanEstimate estimate_plan(const Plan& plan, const std::function<bool()>& stop);

}  // namespace vqkv
