#include "experiment/estimate.h"

#include <algorithm>
#include <map>

#include "core/clock.h"
#include "core/thread_pool.h"
#include "experiment/runner.h"
#include "io/trace.h"

namespace vqkv {

PlanEstimate estimate_plan(const Plan& plan, const std::function<bool()>& stop) {
  PlanEstimate e;
  std::map<std::string, double> seconds_a_layer;  // by the methods of a cell
  std::map<std::string, std::shared_ptr<const TraceReader>> traces;
  for (const Json& cell : plan.cells) {
    if (cell.contains("skip") || (stop && stop())) continue;
    const CellConfig config = config_of(cell);
    auto& reader = traces[config.trace];
    if (!reader) reader = std::make_shared<TraceReader>(config.trace);
    const CacheShape& s = reader->info().shape;
    const double layers = config.layers.empty() ? s.layers : static_cast<double>(config.layers.size());
    const double heads = config.heads.empty() ? s.kv_heads : static_cast<double>(config.heads.size());
    double train = 0, tested = 0;
    for (const auto& d : reader->documents()) {
      if (std::find(config.train.begin(), config.train.end(), d.id) != config.train.end())
        train += static_cast<double>(d.tokens);
      for (const auto* list : {&config.select, &config.report})
        if (std::find(list->begin(), list->end(), d.id) != list->end()) tested += static_cast<double>(d.tokens);
    }
    const double row = static_cast<double>(s.head_dim) * heads;
    e.bytes_read = std::max(e.bytes_read, 2 * layers * row * static_cast<double>(dtype_size(reader->info().stored)) *
                                              (2 * train + 2 * tested));
    // Exact and decoded rows of a layer, a copy on the way; the rows of the units in training, one a thread.
    e.bytes_memory = std::max(
        e.bytes_memory, 4 * (6 * row * tested + 4 * train * s.head_dim * std::min<double>(thread_count(), heads)));
    const std::string methods = cell.at("versions").dump();
    if (!seconds_a_layer.contains(methods)) {
      const Stopwatch watch;
      run_first_layer(cell, *reader, stop);
      seconds_a_layer[methods] = watch.seconds();
      ++e.probed;
    }
    // A training curve trains twice more, with 2.5 times the iterations in all.
    e.seconds += seconds_a_layer[methods] * layers * (config.curve ? 3.5 : 1.0);
  }
  return e;
}

}  // namespace vqkv
