// Plan: a sweep frozen. `plan` expands a configuration into cells, one JSON line each; `run` reads nothing else.
#pragma once
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "codec/codec_set.h"
#include "config/config.h"
#include "core/json.h"
#include "experiment/cell_config.h"

namespace vqkv {

// One line of plan.jsonl:
//   {cell, id, index, config, axes, repeat, group, train_id, trace, model, versions, skip?}
// cell: SHA-256 over (configuration without trace.path, content hash of the trace, model hash, versions): what decides
// the numbers, and nothing else, so that a moved trace keeps its results. versions: of methods, transforms, metrics,
// the policy, the ledger and the sweep's attention. group: the same without the repeated paths; cells of one group are
// one point with a spread. train_id: over what decides the trained parameters alone; it names the random streams, and
// cells that share it share their codecs.
struct Plan {
  // {plan_version, plan, tool, cells, skipped, axes, repeats, traces: [...], content_xxh3: of the cells' lines}
  Json header;
  std::vector<Json> cells;
  std::string hash() const { return header.at("plan").get<std::string>(); }
};

inline constexpr int kPlanVersion = 1;

// Expands, checks every cell against its trace and codec, drops duplicates. Opens each trace once. A sweep
// has one more cell for each protocol, codec exact under the policy streaming, what its window does alone, unless it
// says `streaming: false`.
Plan make_plan(const Config& config);

// One cell as far as its file tells, and its codec for a model: kUsage with a `sweep:` section, or for what no cache
// can hold, with the place. `config` loses its groups.
CellConfig read_single_cell(Config& config);
CodecPlan resolve_single_cell(const Config& config, const CellConfig& cell, const CacheShape& shape);

// One cell, not a sweep (kUsage with a `sweep:` section): what `run` would train, for tools that replay it.
Json make_cell(const Config& config);

// What of a plan learns: "codec 'rvq' (role k)", "transform 'center' (role v)"; "" for nothing.
std::string what_learns(const CodecPlan& plan);
// Bytes of the model-side constants of a plan in which nothing learns: rotations, projections.
int64_t constants_without_training(const CodecPlan& plan, const CacheShape& shape);

// A cell that names no trace, since nothing in it learns: its codecs for a model of `shape`. Unset where it names one;
// kUsage, naming it, where something learns.
struct UntracedCell {
  CellConfig config;
  std::shared_ptr<const CodecSet> codecs;
};
std::optional<UntracedCell> make_untraced_cell(const Config& config, const CacheShape& shape,
                                               const std::string& model_hash);

std::string plan_text(const Plan& plan);
void write_plan(const Plan& plan, const std::string& path);
// Checks every line's identity against its configuration: an edited plan is refused (kBadData). A plan that this build
// wrote and nobody touched is known by the hash of its lines.
Plan read_plan(const std::string& path);
// The same with one cell in memory at a time; gives the header. What is wrong with the whole is told after the last
// cell.
Json read_plan(const std::string& path, const std::function<void(Json&& cell)>& body);

// kUsage, naming them, when versions that a cell was planned for are not those of this build.
void require_versions(const Plan& plan);

// The plan hash that a plan file claims in its first line, of which the rest is not read; "" when it isn't there.
std::string planned_hash(const std::string& path);

// The typed configuration of a cell line.
CellConfig config_of(const Json& cell);

// What differs between two plans, for the message when a store holds another one. At most `limit` lines.
std::string plan_difference(const Plan& have, const Plan& want, int limit = 12);

}  // namespace vqkv
