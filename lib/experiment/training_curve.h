// Whether a cell's codecs are trained to the end: their losses after half, full and twice the training.
#pragma once
#include <functional>
#include <memory>

#include "experiment/trace_rows.h"

namespace vqkv {

using TrainOn = std::function<std::shared_ptr<const CodecSet>(const TraceRows&, const CodecPlan&)>;

// What a training curve trains: the codec in the layers that `config` names or all of the cell's. `skip` says why they
// can't be trained alone.
CodecPlan curve_plan(const CellConfig& config, const CacheShape& shape);

// {role, layers, losses: [{tag, half, full, twice}]} on the select documents, in the layers that `config` names or all
// of the cell's; {reason} where nothing is trained in steps. `full` is what the cell trained, used where the curve is
// of all its layers. kUsage: the named layers can't be trained alone; kBadData: nothing to measure losses by.
Json training_curve(const TraceReader& reader, const CellConfig& config, const CodecSet& full, const TrainOn& train,
                    const std::function<void()>& check);

// Whether some loss still gains more than 5 % by the last doubling.
bool undertrained(const Json& curve);

}  // namespace vqkv
