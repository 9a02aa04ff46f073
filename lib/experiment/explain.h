// A configuration in words: what tokens are coded with, by age.
#pragma once
#include "config/config.h"

namespace vqkv {

// {protocol, tiers: [{tier, tokens, role, codec, bits_per_value, knobs}]}, an entry a tier (from 0, the newest) and
// role. tokens: how many coded tokens the tier holds, "all" for the last. codec: "rvq", "rvq at 2 stages" for a level.
// bits_per_value: codes and side data, the mean over layers and heads of the trace's model; null where the
// configuration names no trace. knobs: a level has none; overrides apart. kUsage as read_single_cell.
Json explain_configuration(const Config& config);

}  // namespace vqkv
