#include "experiment/estimate.h"

#include <algorithm>
#include <functional>
#include <map>
#include <numeric>
#include <span>
#include <vector>

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
double measuring_bytes(const TraceRows& rows, const CodecPlan& plan) {
  const CacheShape& s = rows.scope().shape;
  const ScoreLimits limits;
  double longest = 0, coder = 0;  // numbers that coding a token of a unit holds
  for (const EvalWindow& w : rows.windows()) longest = std::max(longest, static_cast<double>(w.window.tokens));
  for (const UnitSpec& u : plan.units) {
    // As they are coded and as they decode, keys before RoPE, and behind a transform.
    const bool pre = u.unit.role == Role::kKey && u.unit.rope == RopePlacement::kPre;
    coder = std::max(coder,
                     u.unit.channels() * (2.0 + pre + std::min<double>(2, static_cast<double>(u.transforms.size()))));
  }
  const double tiers = static_cast<double>(plan.tiers.size());
  const bool lower = std::ranges::any_of(plan.units, [](const UnitSpec& u) { return needs_of(u).lower; });
  const double kept =
      eval_tokens(rows) * row_width(rows) *
      (4 * kFloat + 2 * sizeof(uint16_t) + tiers * 2 * (2 * kFloat + sizeof(uint16_t)) + (lower ? 4 * kFloat : 0));
  const double coding = thread_count() * longest * coder * kFloat;
  const auto scores = static_cast<double>(limits.peak(rows.windows(), s.group()));
  const double queries = static_cast<double>(rows.queries(true) + rows.queries(false)) * s.group() * s.head_dim;
  const double attention = (4 * scores + std::min(scores, static_cast<double>(limits.tile)) + queries) * kFloat;
  return kept + std::max(coding, attention);
}

// What a unit learns from, as TraceRows reads it: rows of its own, of the other role, gradients and the layer below,
// then what stands beside them.
double set_bytes(const TraceRows& rows, const UnitSpec& spec) {
  const TrainNeeds needs = needs_of(spec);
  const CacheShape& full = rows.reader().info().shape;
  const double width = spec.unit.channels(), d = full.head_dim, n = static_cast<double>(rows.train_rows());
  double bytes = n * (1.0 + needs.other_role + needs.gradients + needs.lower) * width * kFloat +
                 n * (2 * sizeof(int32_t) + (needs.mass ? 2 * kFloat : 0));
  if (needs.queries)
    bytes += (static_cast<double>(rows.reader().queries()) + kMaxTrainQueries * spec.unit.heads) * d * kFloat;
  if (needs.moments) bytes += width * width * kFloat;
  if (needs.output_weight)
    bytes += rows.reader().info().hidden * d * (full.q_heads + full.group() * spec.unit.heads) * kFloat;
  return bytes;
}

double sum_of_largest(std::vector<double> x, size_t count) {
  std::ranges::sort(x, std::greater<>());
  const std::span<const double> largest = std::span(x).first(std::min(count, x.size()));
  return std::accumulate(largest.begin(), largest.end(), 0.0);
}

struct TrainingBytes {
  double peak = 0, kept = 0;
};

// Codecs side by side, one a thread, or one after the other where they are fewer than threads. Units that share pool
// their sets.
TrainingBytes training_bytes(const TraceRows& rows, const CodecPlan& plan) {
  TrainingBytes out;
  std::vector<double> each;
  for (const std::vector<size_t>& members : units_by_codec(plan)) {
    const UnitSpec& spec = plan.units[members[0]];
    if (!needs_of(spec).rows || rows.train_rows() == 0) continue;
    const double own = set_bytes(rows, spec);
    const auto count = static_cast<int64_t>(members.size());
    const int64_t pooled = std::min(count * rows.train_rows(), std::max(rows.train_rows(), kPooledRows));
    const TrainMemory memory = memory_of(spec, pooled);
    const double pool = own * static_cast<double>(pooled) / static_cast<double>(rows.train_rows());
    each.push_back(pool + (count > 1 ? std::max(own, memory.scratch) : memory.scratch));
    out.kept += memory.kept;
  }
  const auto threads = static_cast<size_t>(thread_count());
  out.peak = sum_of_largest(each, each.size() >= threads ? threads : 1);
  return out;
}

double bytes_read(const TraceRows& rows) {
  // Both roles, for the unit that learns or is measured and as the other role of one that learns.
  const double element = static_cast<double>(dtype_size(rows.reader().info().stored));
  const double values = 2 * row_width(rows) * (static_cast<double>(rows.train_rows()) + eval_tokens(rows));
  return 2 * rows.scope().shape.layers * values * element;
}

// Of codec sets in memory: that of a cell, and those that others left for cells that share them.
double codecs_in_memory(const std::map<std::string, double>& by_training) {
  std::vector<double> kept;
  for (const auto& [training, bytes] : by_training) kept.push_back(bytes);
  return sum_of_largest(std::move(kept), kTrainingsKept + 1);
}

// Of many trainings by the same methods as many are run, spread over them.
constexpr size_t kProbes = 16;

struct Training {
  const Json* cell = nullptr;  // the first with it
  double layers = 0;           // of all its cells
  int64_t cells = 0;
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
  double working = 0;
  std::map<std::string, double> kept;       // of codecs, by what decides a cell's rows, and with them its bytes
  std::map<std::string, double> trainings;  // the same by training
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
    const auto [codecs, fresh] = kept.emplace(rows_of.dump(), 0);
    if (fresh) {
      const TraceRows rows(*reader, config);
      const CodecPlan codec = plan_in_scope(resolve_codec(config.codec, shape), rows.scope());
      const TrainingBytes training = training_bytes(rows, codec);
      codecs->second = training.kept;
      working = std::max({working, training.peak, measuring_bytes(rows, codec)});
      e.bytes_read = std::max(e.bytes_read, bytes_read(rows));
    }
    // A training curve has another set, of half or twice the training, beside the cell's.
    trainings[cell.at("train_id").get<std::string>()] = codecs->second * (config.curve ? 2 : 1);
    Training& training = kinds[cell.at("versions").dump()][what_takes_time(config, cell)];
    if (!training.cell) training.cell = &cell;
    const double layers = config.layers.empty() ? shape.layers : static_cast<double>(config.layers.size());
    // A training curve trains twice more, with 2.5 times the iterations in all; where layers are named, three times.
    training.layers += layers;
    if (config.curve)
      training.layers +=
          config.curve_layers.empty() ? 2.5 * layers : 3.5 * static_cast<double>(config.curve_layers.size());
    ++training.cells;
  }
  e.bytes_memory = resident + working + codecs_in_memory(trainings);
  for (const auto& [versions, alike] : kinds) {
    const size_t probes = std::min(alike.size(), kProbes);
    size_t at = 0;
    double measured = 0, other_layers = 0;
    int timed = 0;
    for (const auto& [what, training] : alike) {
      const bool probed = (at + 1) * probes / alike.size() > at * probes / alike.size();
      ++at;
      if (!probed) {
        other_layers += training.layers;
        continue;
      }
      if (stopped()) return e;
      const Stopwatch watch;
      const TraceReader& reader = *traces.at(training.cell->at("config").at("trace").at("path"));
      std::string reason = run_first_layer(*training.cell, reader, stop);
      ++e.probed;
      if (!reason.empty()) {
        e.failures.push_back({training.cell, training.cells, std::move(reason)});
        continue;
      }
      const double seconds = watch.seconds();
      e.seconds += seconds * training.layers;
      measured += seconds;
      ++timed;
    }
    if (timed > 0) e.seconds += measured / timed * other_layers;
  }
  // What a layer of the probed cells took is no less true than a sum of what is known to be held.
  e.bytes_memory = std::max(e.bytes_memory, static_cast<double>(peak_rss_bytes()));
  return e;
}

}  // namespace vqkv
