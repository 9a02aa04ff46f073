#include "experiment/plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <set>

#include "cache/policies/kinds.h"
#include "codec/build.h"
#include "codec/codec_set.h"
#include "codec/transform/transform.h"
#include "config/sweep.h"
#include "core/error.h"
#include "core/hash.h"
#include "core/log.h"
#include "core/version.h"
#include "experiment/cost.h"
#include "experiment/fidelity.h"
#include "experiment/plan_lines.h"
#include "experiment/replay_rows.h"
#include "experiment/trace_facts.h"
#include "metric/metric.h"

namespace vqkv {
namespace {

constexpr size_t kShortId = 8;

Json without(Json tree, const std::string& path) {
  const size_t dot = path.rfind('.');
  Json* map = dot == std::string::npos ? &tree : find_path(tree, path.substr(0, dot));
  if (map && map->is_object()) map->erase(dot == std::string::npos ? path : path.substr(dot + 1));
  return tree;
}

std::string identity(const Json& config, const Json& cell) {
  return config_hash({{"config", without(config, "trace.path")},
                      {"trace", cell.at("trace")},
                      {"model", cell.at("model")},
                      {"versions", cell.at("versions")}});
}

// A repeated path that canonical form renames is dropped from the group's identity by its own name; both levels exist.
std::string group_identity(const Json& cell) {
  Json config = cell.at("config");
  for (const auto& [path, value] : cell.at("repeat").items()) config = without(config, path);
  return identity(config, cell);
}

bool is_measuring(const std::string& versioned) {
  return versioned == "ledger" || versioned == "attention" || versioned.starts_with("metric.") ||
         versioned.starts_with("policy.");
}

std::string train_identity(const CellConfig& c, const Json& cell) {
  Json versions = Json::object();
  for (const auto& [name, version] : cell.at("versions").items())
    if (!is_measuring(name)) versions[name] = version;

  return config_hash({{"codec", trained_part(c.codec)},
                      {"train", c.train},
                      {"train_tokens", c.train_tokens},
                      {"layers", c.layers},
                      {"heads", c.heads},
                      {"seed", c.seed},
                      {"exact_dtype", c.cache.at("exact_dtype")},
                      {"sinks", c.cache.at("sinks")},
                      {"trace", cell.at("trace")},
                      {"model", cell.at("model")},
                      {"versions", versions}});
}

// Of this build, by its name in a cell's `versions`.
int version_now(const std::string& name) {
  if (name == "ledger") return kLedgerVersion;
  if (name == "attention") return kAttentionVersion;
  const size_t dot = name.find('.');
  if (dot == std::string::npos) return find_method(name).describe().version;
  const std::string kind = name.substr(0, dot), own = name.substr(dot + 1);
  if (kind == "metric") return find_metric(own).describe().version;
  if (kind == "policy") return find_policy(own).describe().version;
  return find_transform(own).describe().version;
}

// "policy.streaming", or "" where every token stays: what the rules alone do is the attention's version.
std::string versioned_policy(const Json& cache) {
  const auto policy = cache.find("policy");
  return policy == cache.end() ? "" : "policy." + policy->at("name").get<std::string>();
}

// Names of the versions that measuring a cell of this canonical configuration asks for, whatever its codec.
std::vector<std::string> measuring_versions(const Json& config) {
  std::vector<std::string> names = {"ledger", "attention"};
  for (const auto& metric : config.at("metrics")) names.push_back("metric." + metric.get<std::string>());
  if (const std::string policy = versioned_policy(config.at("cache")); !policy.empty()) names.push_back(policy);
  return names;
}

// Of the methods and transforms of a codec.
Json codec_versions(const CodecPlan& codec) {
  Json versions = Json::object();
  const auto add = [&](const std::string& name) { versions[name] = version_now(name); };
  for (const auto& u : codec.units) {
    add(u.method);
    for (const Json& t : u.transforms) add("transform." + t.at("name").get<std::string>());
  }
  return versions;
}

// versions: of its codec; what else a cell's numbers come from is added.
Json describe_cell(const CellConfig& c, const TraceFacts& facts, Json versions, const Json& axes, const Json& repeat) {
  const Json config = c.canonical();
  for (const std::string& name : measuring_versions(config)) versions[name] = version_now(name);
  Json cell = {{"config", config},
               {"axes", axes},
               {"repeat", repeat},
               {"trace", facts.json.at("content_hash")},
               {"model", facts.json.at("model_hash")},
               {"versions", versions}};
  cell["cell"] = identity(cell.at("config"), cell);
  cell["id"] = cell["cell"].get<std::string>().substr(0, kShortId);
  cell["group"] = group_identity(cell).substr(0, kShortId);
  cell["train_id"] = train_identity(c, cell);
  return cell;
}

// Short ids as long as needed to tell the cells of this plan apart.
void assign_ids(std::vector<Json>& cells) {
  size_t length = kShortId;
  for (bool unique = false; !unique && length < 64;) {
    std::set<std::string> seen;
    unique = true;
    for (const auto& c : cells)
      unique = seen.insert(c.at("cell").get<std::string>().substr(0, length)).second && unique;
    if (!unique) length += 4;
  }
  for (auto& c : cells) c["id"] = c.at("cell").get<std::string>().substr(0, length);
}

Json paths_of(const std::vector<Json>& cells, const char* part) {
  std::set<std::string> paths;
  for (const auto& c : cells)
    for (const auto& [path, value] : c.at(part).items()) paths.insert(path);
  return Json(std::vector<std::string>(paths.begin(), paths.end()));
}

// Points of the window alone, one for each protocol of a sweep: what its rows are measured beside.
class WindowAlone {
 public:
  void add(const SweepPoint& p, const CellConfig& c) {
    if (const std::string why = no_streaming_beside(c.policy()); !why.empty()) {
      if (seen_.insert(why).second) log_info(why);
      return;
    }
    if (!streaming_beside(c.policy())) return;
    SweepPoint alone = p;
    alone.tree["codec"] = {{"name", "exact"}};
    alone.tree["cache"] = c.cache;
    alone.tree["cache"]["policy"] = "streaming";
    alone.axes = Json::object();
    for (const auto& [path, value] : p.axes.items())
      if (path == "codec")
        alone.axes[path] = alone.tree["codec"];
      else if (!path.starts_with("codec."))
        alone.axes[path] = value;
    alone.axes["cache.policy"] = "streaming";
    // Nothing learns here: one seed and one choice of train documents are enough.
    Json key = alone.tree;
    for (const char* of_training : {"seed", "train"}) key.erase(of_training);
    for (const char* of_training : {"train", "train_tokens"}) key["trace"].erase(of_training);
    if (seen_.insert(canonical_json(key)).second) points.push_back(std::move(alone));
  }
  std::vector<SweepPoint> points;

 private:
  std::set<std::string> seen_;
};

void require_train_documents(const Config& config, const CellConfig& c, const std::string& learner) {
  if (!learner.empty() && c.train.empty())
    fail_usage(
        fmt::format("{}: trace.train: no document to learn from, and {} learns; `vqkv-dump inspect` lists a trace's "
                    "documents",
                    config.where("trace.train"), learner));
}

// Why a cell would be without a number, or "".
std::string nothing_measured(const CellConfig& c) {
  const auto means_something = [](const std::string& name) { return find_metric(name).describe().of_dropped; };
  if (!c.policy().drops || std::ranges::any_of(c.metrics, means_something)) return "";
  return fmt::format("metrics: {}: of decoded rows alone, and the policy streaming keeps none",
                     fmt::join(c.metrics, ", "));
}

struct NoRows final : TrainSource {
  TrainData unit(const UnitShape&, const TrainNeeds&) const override { fail_internal("nothing learns here"); }
};

}  // namespace

std::string what_learns(const CodecPlan& plan) {
  for (const UnitSpec& u : plan.units) {
    const auto named = [&](const char* kind, const std::string& name) {
      return fmt::format("{} '{}' (role {})", kind, name, role_name(u.unit.role));
    };
    if (find_method(u.method).needs(u.knobs).rows) return named("codec", u.method);
    for (Json t : u.transforms) {
      const auto name = t.at("name").get<std::string>();
      t.erase("name");
      if (find_transform(name).needs(t).rows) return named("transform", name);
    }
  }
  return "";
}

int64_t constants_without_training(const CodecPlan& plan, const CacheShape& shape) {
  return train_codec_set(plan, shape, NoRows(), {})->constant_bytes();
}

Plan make_plan(const Config& config) {
  Config grouped = config;
  apply_group(grouped);
  Sweep sweep = expand_sweep(grouped);
  Plan plan;
  std::map<std::string, TraceFacts> traces;
  struct Resolved {  // not the units: there may be as many codecs as cells
    std::string skip, learner;
    Json versions;
  };
  std::map<std::string, Resolved> resolved;      // by canonical codec and trace
  std::pair<std::string, CodecPlan> latest;      // by the same, with its units
  std::map<std::string, std::string> conflicts;  // by these and canonical cache
  std::map<std::string, size_t> seen;
  int64_t duplicates = 0, skipped = 0;
  Config point;
  point.marks = sweep.marks;
  WindowAlone alone;
  const auto add = [&](const SweepPoint& p) {
    point.tree = p.tree;
    const auto checked = [&]() -> Json {
      const CellConfig c = read_cell_config(point);
      if (!traces.contains(c.trace)) traces[c.trace] = read_trace_facts(c.trace);
      const TraceFacts& facts = traces.at(c.trace);
      check_against_trace(point, c, facts);
      const std::string key = canonical_json(c.codec) + c.trace;
      const auto units = [&]() -> const CodecPlan& {
        if (latest.first != key) latest = {key, annotated(point, [&] { return resolve_codec(c.codec, facts.shape); })};
        return latest.second;
      };
      if (!resolved.contains(key)) resolved[key] = {units().skip, what_learns(units()), codec_versions(units())};
      const Resolved& codec = resolved.at(key);
      Json cell = describe_cell(c, facts, codec.versions, p.axes, p.repeat);
      std::string skip = !p.skip.empty() ? p.skip : !codec.skip.empty() ? codec.skip : not_swept(c.policy());
      if (skip.empty()) skip = nothing_measured(c);
      if (skip.empty()) {
        const auto [known, fresh] = conflicts.emplace(key + canonical_json(c.cache), "");
        if (fresh) known->second = cache_conflict(c.policy(), units());
        skip = known->second;
      }
      if (!skip.empty())
        cell["skip"] = point.annotate(skip);
      else
        require_train_documents(point, c, codec.learner);
      if (sweep.streaming && skip.empty()) alone.add(p, c);
      return cell;
    };
    Json cell;
    try {
      cell = checked();
    } catch (const Error& e) {
      if (e.kind() != ErrorKind::kUsage || p.axes.empty()) throw;
      fail_usage(fmt::format("{}\n  in the cell {}", e.what(), canonical_json(p.axes)));
    }
    if (!seen.emplace(cell.at("cell").get<std::string>(), plan.cells.size()).second) {
      ++duplicates;
      return;
    }
    skipped += cell.contains("skip");
    cell["index"] = plan.cells.size();
    plan.cells.push_back(std::move(cell));
  };
  for (SweepPoint& p : sweep.points) {
    add(p);
    p = {};  // of a hundred thousand configurations one form is enough
  }
  for (const SweepPoint& p : alone.points) add(p);
  if (duplicates > 0)
    log_info(fmt::format("{} cells resolve to a configuration that is already there and were dropped", duplicates));
  assign_ids(plan.cells);
  Json trace_list = Json::array();
  for (const auto& [path, facts] : traces) trace_list.push_back(facts.json);
  plan.header = {{"plan_version", kPlanVersion},
                 {"plan", plan_hash(plan.cells)},
                 {"tool", version_facts()},
                 {"cells", plan.cells.size()},
                 {"skipped", skipped},
                 {"axes", paths_of(plan.cells, "axes")},
                 {"repeats", paths_of(plan.cells, "repeat")},
                 {"traces", trace_list}};
  plan.header["content_xxh3"] = hash_of_lines(plan.cells);
  return plan;
}

CellConfig read_single_cell(Config& config) {
  apply_group(config);
  if (const Json* sweep = find_path(config.tree, "sweep"); sweep && !sweep->is_null())
    fail_usage(fmt::format("{}: sweep: one cell is expected here, not a sweep", config.where("sweep")));
  config.tree.erase("sweep");
  return read_cell_config(config, false);
}

CodecPlan resolve_single_cell(const Config& config, const CellConfig& c, const CacheShape& shape) {
  const CodecPlan plan = annotated(config, [&] { return resolve_codec(c.codec, shape); });
  const std::string reason = plan.skip.empty() ? cache_conflict(c.policy(), plan) : plan.skip;
  if (!reason.empty()) fail_usage(config.annotate(reason));
  return plan;
}

Json make_cell(const Config& config) {
  Config grouped = config;
  const CellConfig c = read_single_cell(grouped);
  if (c.trace.empty())
    fail_usage(fmt::format("{}: trace.path: the trace is missing; write trace.path=FILE.trace.h5",
                           grouped.where("trace.path")));
  const TraceFacts facts = read_trace_facts(c.trace);
  check_against_trace(grouped, c, facts);
  const CodecPlan codec = resolve_single_cell(grouped, c, facts.shape);
  require_train_documents(grouped, c, what_learns(codec));
  return describe_cell(c, facts, codec_versions(codec), Json::object(), Json::object());
}

std::optional<UntracedCell> make_untraced_cell(const Config& config, const CacheShape& shape,
                                               const std::string& model_hash) {
  Config grouped = config;
  UntracedCell out;
  out.config = read_single_cell(grouped);
  if (!out.config.trace.empty()) return std::nullopt;
  const CodecPlan codec = resolve_single_cell(grouped, out.config, shape);
  if (const std::string learner = what_learns(codec); !learner.empty())
    fail_usage(
        fmt::format("{}: {} learns from a trace, and none is named; write trace: {{path: FILE.trace.h5, train: "
                    "[...]}}",
                    grouped.where("codec"), learner));
  const TrainOptions options{
      .cell = config_hash({{"codec", trained_part(out.config.codec)}, {"seed", out.config.seed}}),
      .model_hash = model_hash,
      .progress = {}};
  out.codecs = train_codec_set(codec, shape, NoRows(), options);
  return out;
}

void require_versions(const Plan& plan) {
  std::map<std::string, int> current;
  const auto now = [&](const std::string& name) {
    const auto it = current.find(name);
    return it != current.end() ? it->second : current[name] = version_now(name);
  };
  std::map<std::string, std::string> others;
  for (const Json& cell : plan.cells) {
    if (cell.contains("skip")) continue;
    const Json& planned = cell.at("versions");
    for (const auto& [name, version] : planned.items())
      if (version != now(name)) others[name] = fmt::format("{} in the plan, {} here", version.dump(), now(name));
    for (const std::string& name : measuring_versions(cell.at("config")))
      if (!planned.contains(name)) others[name] = fmt::format("absent in the plan, {} here", now(name));
  }
  if (others.empty()) return;
  std::string list;
  for (const auto& [name, difference] : others)
    list += fmt::format("{}{}: {}", list.empty() ? "" : "; ", name, difference);
  fail_usage(fmt::format("the plan was made by versions whose numbers differ ({}); plan again", list));
}

std::string cell_problem(const Json& c) {
  if (identity(c.at("config"), c) != c.at("cell").get<std::string>())
    return "the configuration is not the one that was planned; plan again instead of editing";
  if (!c.at("cell").get<std::string>().starts_with(c.at("id").get<std::string>()) ||
      c.at("id").get<std::string>().size() < kShortId)
    return "id is not the beginning of cell";
  if (group_identity(c).substr(0, kShortId) != c.at("group") || train_identity(config_of(c), c) != c.at("train_id"))
    return "group or train_id does not belong to the configuration";
  return "";
}

CellConfig config_of(const Json& cell) {
  Config config;
  config.tree = cell.at("config");
  Json& roles = config.tree.at("trace");
  for (const char* role : {"train", "select", "report"})  // canonical form writes a role without documents, too
    if (roles.at(role).empty()) roles.erase(role);
  try {
    return read_cell_config(config, false);
  } catch (const Error& e) {
    if (e.kind() != ErrorKind::kUsage) throw;
    fail_data(fmt::format("a planned configuration is not valid: {}", e.what()));
  }
}

}  // namespace vqkv
