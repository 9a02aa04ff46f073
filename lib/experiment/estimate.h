// What a plan will cost, found by running a little of it.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "experiment/plan.h"

namespace vqkv {

struct PlanEstimate {
  double seconds = 0;       // on the threads of this process, one cell after another
  double bytes_read = 0;    // of the trace, a cell
  double bytes_memory = 0;  // of the process at the peak of its largest cell, one cell at a time
  int probed = 0;           // cells whose first layer was trained and measured
  struct Failure {
    const Json* cell = nullptr;  // of the plan
    int64_t alike = 0;           // cells that share its training but for the seed, itself among them
    std::string reason;
  };
  std::vector<Failure> failures;  // of the probed cells; no time is counted for them and those alike
};

// One layer of every training is run, whatever its seed, and scaled to all layers and cells: at most a layer's share of
// the whole. Of a kind (methods and metrics) with more than 16 trainings 16 are run, and the rest take their mean.
PlanEstimate estimate_plan(const Plan& plan, const std::function<bool()>& stop);

}  // namespace vqkv
