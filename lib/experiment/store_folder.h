// The folder of a sweep's results, and the plan that it belongs to.
#pragma once
#include "experiment/plan.h"

namespace vqkv {

// Makes FOLDER and its plan.jsonl, or checks that the plan there is this one (kUsage with the difference otherwise).
// Safe against shards that start at once.
void open_store(const std::string& folder, const Plan& plan);

}  // namespace vqkv
