#include "experiment/result_set.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <limits>
#include <unordered_map>

#include "core/error.h"
#include "io/json_fields.h"

namespace vqkv {
namespace {

namespace fs = std::filesystem;

std::string plan_path(const std::string& folder) { return (fs::path(folder) / "plan.jsonl").string(); }

// What is kept of a plan's line with kStatus.
Json status_part(const Json& line) {
  Json kept;
  for (const char* key : {"cell", "id", "axes", "repeat"}) kept[key] = line.at(key);
  return kept;
}

// What a record is found, counted and told by.
void require_facts(const Json& facts, const std::string& where) {
  text_field(facts, "cell", where);
  const std::string status = choice_field(facts, "status", {"ok", "failed", "skipped"}, where);
  if (status != "ok") text_field(facts, "reason", where);
  if (facts.contains("attempt")) integer_field(facts, "attempt", 0, INT64_MAX, where);
  if (facts.contains("flags"))
    list_field(
        facts, "flags", [](const Json& f) { return f.is_string(); }, "a list of texts", where);
}

// What choices, tables and figures read of measurements.
void require_measurements(const Json& record, const std::string& where) {
  const auto map = [](const Json& x) { return x.is_object(); };
  const std::string of_one = where + ": a measurement";
  for (const Json& m : list_field(record, "measurements", map, "a list of maps", where)) {
    measurement_head_from_json(m, of_one);
    text_field(m, "role", of_one);
    for (const char* key : {"context", "sequences"})
      if (m.contains(key)) integer_field(m, key, 0, INT64_MAX, of_one);
    if (!m.contains("details")) continue;
    for (const Json& d : list_field(m, "details", map, "a list of maps", of_one)) {
      text_field(d, "axis", of_one);
      list_field(
          d, "shape", [](const Json& n) { return n.is_number_integer(); }, "a list of integers", of_one);
      list_field(
          d, "values", [](const Json& x) { return x.is_number() || x.is_null(); }, "a list of numbers", of_one);
    }
  }
}

void read_records(ResultSet& out, Records records) {
  std::error_code ec;
  std::unordered_map<std::string, size_t> index;
  for (size_t i = 0; i < out.cells.size(); ++i) index[out.cells[i].cell.at("cell").get<std::string>()] = i;
  if (fs::is_directory(fs::path(out.folder) / "results", ec))
    for (const auto& f : fs::directory_iterator(fs::path(out.folder) / "results"))
      if (f.path().extension() == ".jsonl") out.files.push_back(f.path().string());
  std::sort(out.files.begin(), out.files.end());
  int64_t strangers = 0;
  for (size_t file = 0; file < out.files.size(); ++file) {
    RecordIndex read = read_record_index(out.files[file]);
    if (!read.torn.empty()) out.problems.push_back(read.torn + " was left out; that cell runs again");
    for (RecordEntry& e : read.entries) {
      const Json& r = e.facts;
      require_facts(r, e.place.in(out.files[file]));
      const auto it = index.find(r.at("cell").get<std::string>());
      if (it == index.end()) {
        ++strangers;
        continue;
      }
      const auto rank = [](const Json& x) { return x.at("status") == "ok" ? 1 : 0; };
      const auto attempt = [](const Json& x) { return x.value("attempt", int64_t{0}); };
      CellResult& have = out.cells[it->second];
      const bool newer = have.record.is_null() || rank(r) > rank(have.record) ||
                         (rank(r) == rank(have.record) && attempt(r) > attempt(have.record));
      if (!newer) continue;
      have.record = std::move(e.facts);
      have.file = file;
      have.place = e.place;
    }
  }
  if (records == Records::kWhole)
    for_each_record(out, [&](size_t cell, Json&& record) { out.cells[cell].record = std::move(record); });
  if (strangers > 0)
    out.problems.push_back(fmt::format("{} records belong to no cell of the plan and were left out", strangers));
}

}  // namespace

std::string CellResult::id() const { return cell.at("id").get<std::string>(); }
std::string CellResult::status() const {
  return record.is_null() ? "pending" : record.value("status", std::string("pending"));
}
std::string CellResult::reason() const { return record.is_null() ? "" : record.value("reason", std::string()); }

bool CellResult::flagged(const std::string& flag) const {
  if (!record.is_object() || !record.contains("flags")) return false;
  const Json& flags = record["flags"];
  return std::find(flags.begin(), flags.end(), Json(flag)) != flags.end();
}

const Json* CellResult::find(const std::string& role, const std::string& tag, int64_t context,
                             int64_t sequences) const {
  if (!record.is_object() || !record.contains("measurements")) return nullptr;
  for (const auto& m : record["measurements"]) {
    if (m.value("role", "") != role || m.value("tag", "") != tag) continue;
    if (context != 0 && m.value("context", int64_t{0}) != context) continue;
    if (sequences != 0 && m.value("sequences", int64_t{0}) != sequences) continue;
    return &m;
  }
  return nullptr;
}

double CellResult::value(const std::string& role, const std::string& tag, int64_t context, int64_t sequences) const {
  const Json* m = find(role, tag, context, sequences);
  return m && m->contains("value") && (*m)["value"].is_number() ? (*m)["value"].get<double>()
                                                                : std::numeric_limits<double>::quiet_NaN();
}

int64_t ResultSet::count(const std::string& status) const {
  return std::count_if(cells.begin(), cells.end(), [&](const CellResult& c) { return c.status() == status; });
}

ResultSet load_results(const std::string& folder, Records records) {
  std::error_code ec;
  if (!fs::exists(plan_path(folder), ec))
    fail_usage(
        fmt::format("{} is not a result folder: it has no plan.jsonl; `vqkv-sweep run plan.jsonl -o {}` makes one",
                    folder, folder));
  ResultSet out;
  out.folder = folder;
  out.plan = read_plan(plan_path(folder), [&](Json&& line) {
    out.cells.push_back({records == Records::kStatus ? status_part(line) : std::move(line), Json()});
  });
  read_records(out, records);
  return out;
}

ResultSet load_results(const std::string& folder, const Plan& plan, Records records) {
  ResultSet out;
  out.folder = folder;
  out.plan = plan.header;
  for (const Json& c : plan.cells) out.cells.push_back({records == Records::kStatus ? status_part(c) : c, Json()});
  read_records(out, records);
  return out;
}

void for_each_planned(const ResultSet& results, const std::function<void(size_t cell, Json&& line)>& body) {
  size_t cell = 0;
  read_plan(plan_path(results.folder), [&](Json&& line) {
    if (cell >= results.cells.size() || results.cells[cell].cell.at("cell") != line.at("cell"))
      fail_data(fmt::format("{}: another plan since it was read first", plan_path(results.folder)));
    body(cell++, std::move(line));
  });
}

void for_each_record(const ResultSet& results, const std::function<void(size_t cell, Json&& record)>& body) {
  std::vector<RecordReader> readers;
  for (const auto& f : results.files) readers.emplace_back(f);
  for (size_t i = 0; i < results.cells.size(); ++i) {
    const CellResult& c = results.cells[i];
    if (c.record.is_null()) continue;
    Json record = readers[c.file].read(c.place);
    const std::string where = c.place.in(results.files[c.file]);
    require_facts(record, where);
    if (record["status"] == "ok") require_measurements(record, where);
    body(i, std::move(record));
  }
}

}  // namespace vqkv
