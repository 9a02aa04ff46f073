// A plan as a file: written, read and held against what was planned, one cell at a time.
#include <fmt/format.h>

#include <fstream>
#include <set>

#include "core/error.h"
#include "core/hash.h"
#include "core/version.h"
#include "experiment/plan.h"
#include "experiment/plan_lines.h"
#include "io/atomic_file.h"
#include "io/json_fields.h"
#include "io/result_index.h"
#include "io/store.h"

namespace vqkv {
namespace {

// What a plan's hash is of: a line a cell.
std::string hashed_line(const Json& cell) {
  return cell.at("cell").get<std::string>() + (cell.contains("skip") ? " skip\n" : "\n");
}

// What readers of a plan take for granted; what a cell says beyond is held against its identity.
void require_header(const Json& header, const std::string& where) {
  const auto text = [](const Json& x) { return x.is_string(); };
  text_field(header, "plan", where);
  integer_field(header, "skipped", 0, INT64_MAX, where);
  for (const char* key : {"axes", "repeats"}) list_field(header, key, text, "a list of texts", where);
  const auto map = [](const Json& x) { return x.is_object(); };
  for (const Json& t : list_field(header, "traces", map, "a list of maps", where)) text_field(t, "path", where);
}
void require_cell(const Json& cell, const std::string& where) {
  for (const char* key : {"cell", "id", "group", "train_id", "trace", "model"}) text_field(cell, key, where);
  for (const char* key : {"config", "versions", "axes", "repeat"}) map_field(cell, key, where);
  integer_field(cell, "index", 0, INT64_MAX, where);
  if (cell.contains("skip")) text_field(cell, "skip", where);
}

// Of the lines below a plan's first, as they stand in its file.
std::string content_hash(std::string_view lines) {
  ContentHash hash;
  hash.update(lines.data(), lines.size());
  return hash.hex();
}

// The lines of a plan's file in order.
void for_each_line(const Plan& plan, const std::function<void(const std::string&)>& body) {
  body(plan.header.dump() + "\n");
  for (const Json& c : plan.cells) body(c.dump() + "\n");
}

}  // namespace

std::string plan_hash(const std::vector<Json>& cells) {
  std::string all;
  for (const auto& c : cells) all += hashed_line(c);
  return sha256_hex(all);
}

std::string hash_of_lines(const std::vector<Json>& cells) {
  ContentHash hash;
  for (const Json& c : cells) {
    const std::string line = c.dump() + "\n";
    hash.update(line.data(), line.size());
  }
  return hash.hex();
}

std::string plan_text(const Plan& plan) {
  std::string text;
  for_each_line(plan, [&](const std::string& line) { text += line; });
  return text;
}

void write_plan(const Plan& plan, const std::string& path) {
  AtomicFile file(path);
  for_each_line(plan, [&](const std::string& line) { file.write(line); });
  file.commit();
}

Plan read_plan(const std::string& path) {
  Plan plan;
  plan.header = read_plan(path, [&](Json&& cell) { plan.cells.push_back(std::move(cell)); });
  return plan;
}

Json read_plan(const std::string& path, const std::function<void(Json&& cell)>& body) {
  const std::string text = read_file(path);
  Json header;
  bool same_lines = false, as_written = false;
  std::string hashed;
  int64_t cells = 0;
  const auto read_header = [&](Json&& record, int64_t line) {
    if (!record.contains("plan_version"))
      fail_data(fmt::format("{}: not a plan; `vqkv-sweep plan sweep.yaml -o plan.jsonl` writes one", path));
    header = std::move(record);
    if (header["plan_version"] != kPlanVersion)
      fail_data(fmt::format("{}: plan version {}; this tool reads version {}", path, header["plan_version"].dump(),
                            kPlanVersion));
    require_header(header, fmt::format("{} line {}", path, line));
    // What this very build wrote it has checked; a hundred thousand configurations need not be read again at each
    // start.
    same_lines =
        header.value("content_xxh3", Json()) == content_hash(std::string_view(text).substr(text.find('\n') + 1));
    as_written = same_lines && header.value("tool", Json()) == version_facts();
  };
  const auto check = [&](const Json& c, int64_t line) {
    const std::string where = fmt::format("{} line {}", path, line);
    require_cell(c, where);
    std::string problem;
    try {
      problem = cell_problem(c);
    } catch (const Json::exception&) { problem = "the configuration lacks what every planned one has"; }
    if (problem.empty() && c.at("index") != cells) problem = "index is out of order";
    if (!problem.empty()) fail_data(fmt::format("{}: {}", where, problem));
    hashed += hashed_line(c);
  };
  const std::string torn = parse_jsonl(text, path, [&](Json&& record, int64_t line) {
    if (header.is_null()) return read_header(std::move(record), line);
    if (!as_written) check(record, line);
    ++cells;
    body(std::move(record));
  });
  if (!torn.empty()) fail_data(fmt::format("{}; a plan must be complete", torn));
  if (header.is_null()) read_header(Json::object(), 1);
  if (as_written) return header;
  if (header["plan"] != sha256_hex(hashed))
    fail_data(fmt::format("{}: cells were added or removed after planning", path));
  // What of a line isn't part of its identity, such as the axes that tables show.
  if (header.contains("content_xxh3") && !same_lines)
    fail_data(fmt::format("{}: lines were changed after planning; plan again instead of editing", path));
  return header;
}

std::string planned_hash(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  std::string line;
  std::getline(in, line);
  const JsonlRead read = parse_jsonl(line, path);
  const Json hash = read.records.empty() ? Json() : read.records[0].value("plan", Json());
  return hash.is_string() ? hash.get<std::string>() : "";
}

std::string plan_difference(const Plan& have, const Plan& want, int limit) {
  std::map<std::string, const Json*> old;
  for (const auto& c : have.cells) old[c.at("cell").get<std::string>()] = &c;
  std::set<std::string> kept;
  std::vector<const Json*> added, removed;
  for (const auto& c : want.cells) {
    if (old.contains(c.at("cell").get<std::string>()))
      kept.insert(c.at("cell").get<std::string>());
    else
      added.push_back(&c);
  }
  for (const auto& c : have.cells)
    if (!kept.contains(c.at("cell").get<std::string>())) removed.push_back(&c);
  std::string out = fmt::format("{} cells in both, {} only in the store's plan, {} only in the new one", kept.size(),
                                removed.size(), added.size());
  // The paths that tell the first removed from the first added cell say what was changed.
  if (!added.empty() && !removed.empty()) {
    const Json a = flatten_paths(removed[0]->at("config")), b = flatten_paths(added[0]->at("config"));
    std::set<std::string> paths;
    for (const auto& [p, v] : a.items()) paths.insert(p);
    for (const auto& [p, v] : b.items()) paths.insert(p);
    int lines = 0;
    const auto shown = [](const Json& flat, const std::string& p) {
      return flat.contains(p) ? flat[p].dump() : std::string("absent");
    };
    for (const auto& p : paths) {
      if (shown(a, p) == shown(b, p)) continue;
      if (++lines > limit) break;
      out += fmt::format("\n  {}: {} in the store, {} in the new plan", p, shown(a, p), shown(b, p));
    }
    for (const char* key : {"trace", "model", "versions"})
      if (removed[0]->at(key) != added[0]->at(key))
        out += fmt::format("\n  {}: {} in the store, {} in the new plan", key, removed[0]->at(key).dump(),
                           added[0]->at(key).dump());
  }
  return out;
}

}  // namespace vqkv
