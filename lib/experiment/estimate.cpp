#include "experiment/estimate.h"

#include <algorithm>
#include <map>
#include <set>

#include "core/clock.h"
#include "core/thread_pool.h"
#include "experiment/fidelity.h"
#include "experiment/runner.h"
#include "io/trace.h"

namespace vqkv {
namespace {

constexpr double kFloat = sizeof(float);

double eval_tokens(const TraceRows& rows) { return static_cast<double>(rows.tokens(true) + rows.tokens(false)); }

// Numbers of one role of all heads in scope at a token.
double row_width(const TraceRows& rows) {
  return static_cast<double>(rows.scope().shape.head_dim) * rows.scope().shape.kv_heads;
}

// Measuring a layer: its exact and decoded rows and their codes, then either the rows in coding, a unit a thread, or
// the queries and attention rows of a head, of which `attention_output` copies a tile.
double measuring_bytes(const TraceRows& rows, double unit_width, size_t older_tiers, const ScoreLimits& limits) {
  const CacheShape& s = rows.scope().shape;
  double longest = 0;
  for (const EvalWindow& w : rows.windows()) longest = std::max(longest, static_cast<double>(w.window.tokens));
  const double kept =
      eval_tokens(rows) * row_width(rows) *
      (4 * kFloat + 2 * sizeof(uint16_t) + static_cast<double>(older_tiers) * 2 * (2 * kFloat + sizeof(uint16_t)));
  const double coding = thread_count() * longest * unit_width * 2 * kFloat;
  const auto scores = static_cast<double>(limits.peak(rows.windows(), s.group()));
  const double queries = static_cast<double>(rows.queries(true) + rows.queries(false)) * s.group() * s.head_dim;
  const double attention = (4 * scores + std::min(scores, static_cast<double>(limits.tile)) + queries) * kFloat;
  return kept + std::max(coding, attention);
}

// Training: of each unit at work the rows and the other role's where one learns from it, and a copy where a transform
// or a codec makes one; a head's queries on the way.
double training_bytes(const TraceRows& rows, const CodecPlan& plan, double unit_width) {
  TrainNeeds needs;
  for (const UnitSpec& u : plan.units) needs |= needs_of(u);
  if (!needs.rows) return 0;
  const double units = plan.units.size() >= static_cast<size_t>(thread_count()) ? thread_count() : 1;
  const double queries = needs.queries ? static_cast<double>(rows.reader().queries()) * rows.scope().shape.head_dim : 0;
  return units * ((needs.other_role ? 4 : 2) * static_cast<double>(rows.train_rows()) * unit_width + queries) * kFloat;
}

struct CellBytes {
  double read = 0, held = 0;
};

CellBytes cell_bytes(const TraceRows& rows, const CodecPlan& codec) {
  double unit_width = 0;
  for (const UnitSpec& u : codec.units) unit_width = std::max(unit_width, static_cast<double>(u.unit.channels()));
  // Both roles, for the unit that learns or is measured and as the other role of one that learns.
  const double element = static_cast<double>(dtype_size(rows.reader().info().stored));
  const double values = 2 * row_width(rows) * (static_cast<double>(rows.train_rows()) + eval_tokens(rows));
  return {2 * rows.scope().shape.layers * values * element,
          std::max(training_bytes(rows, codec, unit_width), measuring_bytes(rows, unit_width, codec.tiers.size(), {}))};
}

// Of many trainings by the same methods as many are run, spread over them.
constexpr size_t kProbes = 16;

struct Training {
  const Json* cell = nullptr;  // the first with it
  double layers = 0;           // of all its cells
};

// What decides how long a layer takes: all but the seed and the cache.
std::string what_takes_time(const CellConfig& config, const Json& cell) {
  const Json& canonical = cell.at("config");
  return canonical_json({{"codec", trained_part(config.codec)},
                         {"trace", canonical.at("trace")},
                         {"heads", canonical.at("heads")},
                         {"versions", cell.at("versions")}});
}

}  // namespace

PlanEstimate estimate_plan(const Plan& plan, const std::function<bool()>& stop) {
  PlanEstimate e;
  const auto stopped = [&] { return stop && stop(); };
  const auto resident = static_cast<double>(peak_rss_bytes());
  std::set<std::string> seen;  // what decides a cell's rows, and with them its bytes
  std::map<std::string, std::shared_ptr<const TraceReader>> traces;
  std::map<std::string, std::map<std::string, Training>> kinds;  // by versions, then by what decides a layer's time
  for (const Json& cell : plan.cells) {
    if (cell.contains("skip") || stopped()) continue;
    const CellConfig config = config_of(cell);
    auto& reader = traces[config.trace];
    if (!reader) reader = std::make_shared<TraceReader>(config.trace);
    const CacheShape& shape = reader->info().shape;
    Json rows_of = Json::object();
    for (const char* key : {"trace", "codec", "cache", "layers", "heads"}) rows_of[key] = cell.at("config").at(key);
    if (seen.insert(rows_of.dump()).second) {
      const TraceRows rows(*reader, config);
      const CellBytes bytes = cell_bytes(rows, plan_in_scope(resolve_codec(config.codec, shape), rows.scope()));
      e.bytes_read = std::max(e.bytes_read, bytes.read);
      e.bytes_memory = std::max(e.bytes_memory, resident + bytes.held);
    }
    Training& training = kinds[cell.at("versions").dump()][what_takes_time(config, cell)];
    if (!training.cell) training.cell = &cell;
    const double layers = config.layers.empty() ? shape.layers : static_cast<double>(config.layers.size());
    // A training curve trains twice more, with 2.5 times the iterations in all.
    training.layers += layers * (config.curve ? 3.5 : 1.0);
  }
  for (const auto& [versions, alike] : kinds) {
    const size_t probes = std::min(alike.size(), kProbes);
    size_t at = 0;
    double a_layer = 0, other_layers = 0;
    for (const auto& [what, training] : alike) {
      const bool probed = (at + 1) * probes / alike.size() > at * probes / alike.size();
      ++at;
      if (!probed) {
        other_layers += training.layers;
        continue;
      }
      if (stopped()) return e;
      const Stopwatch watch;
      run_first_layer(*training.cell, *traces.at(training.cell->at("config").at("trace").at("path")), stop);
      const double seconds = watch.seconds();
      e.seconds += seconds * training.layers;
      a_layer += seconds / static_cast<double>(probes);
      ++e.probed;
    }
    e.seconds += a_layer * other_layers;
  }
  // What a layer of the probed cells took is no less true than a sum of what is known to be held.
  e.bytes_memory = std::max(e.bytes_memory, static_cast<double>(peak_rss_bytes()));
  return e;
}

}  // namespace vqkv
