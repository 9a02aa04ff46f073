#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <map>
#include <set>

#include "common/tool.h"
#include "config/config.h"
#include "core/clock.h"
#include "core/error.h"
#include "core/log.h"
#include "core/thread_pool.h"
#include "experiment/estimate.h"
#include "experiment/plan.h"
#include "experiment/protocol.h"
#include "experiment/report.h"
#include "experiment/result_set.h"
#include "experiment/runner.h"
#include "io/atomic_file.h"
#include "io/result_index.h"
#include "verbs.h"

namespace vqkv::sweep {
namespace {

std::string text(const Json& v) { return v.is_string() ? v.get<std::string>() : v.dump(); }

// Columns of the swept paths, then values of a cell under them.
void add_axes(Table& t, const Json& header) {
  for (const char* part : {"axes", "repeats"})
    for (const auto& path : header.at(part)) t.columns.push_back({path.get<std::string>(), "", "", false});
}
void fill_axes(Json& row, const Json& cell) {
  for (const char* part : {"axes", "repeat"})
    for (const auto& [path, value] : cell.at(part).items())
      row[path] = value.is_structured() ? Json(value.dump()) : value;
}

std::string human_seconds(double s) {
  if (s < 90) return fmt::format("{:.0f} s", std::ceil(s));
  if (s < 5400) return fmt::format("{:.0f} min", std::ceil(s / 60));
  return fmt::format("{:.1f} h", s / 3600);
}

}  // namespace

double parse_duration(const std::string& duration) {
  double value = 0;
  const auto r = std::from_chars(duration.data(), duration.data() + duration.size(), value);
  const std::string unit(r.ptr, duration.data() + duration.size());
  const std::map<std::string, double> units = {{"", 1}, {"s", 1}, {"m", 60}, {"h", 3600}, {"d", 86400}};
  if (r.ec != std::errc() || !std::isfinite(value) || value <= 0 || !units.contains(unit))
    fail_usage(fmt::format("'{}' is not a duration; write 90s, 55m or 2h", duration));
  return value * units.at(unit);
}

int run_plan_verb(const PlanVerb& verb, const Common& common) {
  if (verb.out.empty() && !verb.dry_run) fail_usage("plan: where to? -o plan.jsonl, or --dry-run to look first");
  Config config = load_config(verb.file);
  for (const auto& o : verb.overrides) apply_override(config, o);
  if (!verb.group.empty()) apply_override(config, "group=" + verb.group);
  if (!verb.dry_run) require_writable(verb.out);
  const Plan plan = make_plan(config);
  Table t;
  t.columns = {{"id", "", "", false}};
  add_axes(t, plan.header);
  t.columns.push_back({"status", "", "", false});
  for (const Json& c : plan.cells) {
    Json row = {{"id", c.at("id")}, {"status", c.contains("skip") ? "skipped: " + text(c.at("skip")) : "planned"}};
    fill_axes(row, c);
    t.rows.push_back(std::move(row));
  }
  const int64_t cells = static_cast<int64_t>(plan.cells.size()), skipped = plan.header.at("skipped").get<int64_t>();
  if (verb.dry_run) {
    const PlanEstimate e = estimate_plan(plan, [] { return interrupted(); });
    int64_t failing = 0;
    for (const PlanEstimate::Failure& f : e.failures) {
      failing += f.alike;
      log_warning(fmt::format("cell {}{} would fail{}: {}", f.cell->at("id").get<std::string>(),
                              f.alike > 1 ? fmt::format(" and {} with its training", f.alike - 1) : "",
                              axes_text(*f.cell), f.reason));
    }
    if (common.format == TableFormat::kMarkdown) print(t, common.format);
    Table sum;
    sum.columns = {{"quantity", "", "", false}, {"value", "", "", false}};
    sum.rows = {
        {{"quantity", "cells"}, {"value", cells}},
        {{"quantity", "skipped"}, {"value", skipped}},
        {{"quantity", "would fail"}, {"value", failing}},
        {{"quantity", "bytes read a cell"},
         {"value", common.format == TableFormat::kMarkdown ? Json(human_bytes(e.bytes_read)) : Json(e.bytes_read)}},
        {{"quantity", "peak memory"},
         {"value", common.format == TableFormat::kMarkdown ? Json(human_bytes(e.bytes_memory)) : Json(e.bytes_memory)}},
        {{"quantity", fmt::format("time on {} threads", thread_count())},
         {"value",
          common.format == TableFormat::kMarkdown ? Json("about " + human_seconds(e.seconds)) : Json(e.seconds)}}};
    if (common.format == TableFormat::kMarkdown) std::printf("\n");
    print(sum, common.format);
    log_info(fmt::format("time: one layer of {} cells was run and scaled", e.probed));
    return e.failures.empty() ? kExitOk : kExitSomeFailed;  // as the run would end
  }
  print(t, common.format);
  write_plan(plan, verb.out);
  log_info(fmt::format("{} cells ({} skipped) in {}, plan {}", cells, skipped, verb.out, plan.hash().substr(0, 12)));
  return kExitOk;
}

int run_run(const RunVerb& verb, const Common& common) {
  const Plan plan = read_plan(verb.plan);
  RunOptions o;
  o.folder = verb.out;
  o.jobs = verb.jobs;
  if (o.jobs > thread_count())
    fail_usage(fmt::format("--jobs {}: there are {} threads, and a cell needs one", o.jobs, thread_count()));
  if (!verb.shard.empty()) {
    parse_shard(verb.shard, o.shard, o.shards);
    o.writer = fmt::format("shard-{}-of-{}", o.shard, o.shards);
  }
  if (!verb.writer.empty()) {
    if (verb.writer.find_first_not_of("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") !=
            std::string::npos ||
        verb.writer[0] == '.')
      fail_usage(fmt::format("--writer {}: letters, digits, dot, dash and underscore", verb.writer));
    o.writer = verb.writer;
  }
  if (!verb.time_budget.empty()) o.time_budget = parse_duration(verb.time_budget);
  o.retry_failed = verb.retry_failed;
  o.fail_fast = verb.fail_fast;
  o.keep_codecs = verb.keep_codecs;
  o.trust_trace = verb.trust_trace;
  o.command = common.command;
  o.stop = [] { return interrupted(); };
  const Stopwatch clock;
  const RunSummary s = run_plan(plan, o);
  Table t;
  t.columns = {{"ok", ""}, {"failed", ""}, {"skipped", ""}, {"before", ""}, {"left", ""}, {"seconds", "", "{:.1f}"}};
  t.rows = {{{"ok", s.ok},
             {"failed", s.failed},
             {"skipped", s.skipped},
             {"before", s.before},
             {"left", s.left},
             {"seconds", clock.seconds()}}};
  print(t, common.format);
  if (interrupted())
    log_warning(fmt::format("{} cells are left; the same command continues", s.left));
  else if (s.out_of_time)
    log_warning(fmt::format("the time budget is spent with {} cells left; the same command continues", s.left));
  const ResultSet r = load_results(verb.out, plan, Records::kStatus);
  return r.count("failed") > 0 ? kExitSomeFailed : kExitOk;
}

int run_status(const std::string& folder, bool cells, const Common& common) {
  const ResultSet r = load_results(folder, Records::kStatus);
  for (const auto& p : r.problems) log_warning(p);
  Table t;
  if (cells) {
    t.columns = {{"id", "", "", false}};
    add_axes(t, r.plan);
    for (const char* c : {"status", "flags", "reason"}) t.columns.push_back({c, "", "", false});
    for (const auto& c : r.cells) {
      std::string flags;
      for (const auto& f : c.record.is_object() ? c.record.value("flags", Json::array()) : Json::array())
        flags += (flags.empty() ? "" : " ") + text(f);
      Json row = {{"id", c.id()}, {"status", c.status()}, {"flags", flags}, {"reason", c.reason()}};
      fill_axes(row, c.cell);
      t.rows.push_back(std::move(row));
    }
  } else {
    t.columns = {{"plan", "", "", false}, {"cells", ""}, {"ok", ""}, {"failed", ""}, {"skipped", ""}, {"pending", ""}};
    t.rows = {{{"plan", r.plan.at("plan").get<std::string>().substr(0, 12)},
               {"cells", r.cells.size()},
               {"ok", r.count("ok")},
               {"failed", r.count("failed")},
               {"skipped", r.count("skipped")},
               {"pending", r.count("pending")}}};
    for (const auto& c : r.cells)
      if (c.status() == "failed") log_warning(fmt::format("cell {} failed: {}", c.id(), c.reason()));
  }
  print(t, common.format);
  return kExitOk;
}

int run_merge(const std::string& folder, const Common& common) {
  const ResultSet r = load_results(folder, Records::kStatus);
  for (const auto& p : r.problems) log_warning(p);
  std::set<std::string> columns;
  for_each_planned(r, [&](size_t cell, Json&& line) {
    if (!r.cells[cell].record.is_null()) add_config_columns(line, columns);
  });
  const auto done = static_cast<int64_t>(r.cells.size()) - r.count("pending");
  const RecordSource records = [&](const auto& body) {
    for_each_record(r, [&](size_t, Json&& record) {
      record["protocol"] = protocol_of_cell(record.at("config"));
      body(record);
    });
  };
  const std::filesystem::path at(folder);
  write_result_csv((at / "results.csv").string(), columns, records);
  write_result_sqlite((at / "results.sqlite").string(), records, r.plan);
  Table t;
  t.columns = {{"file", "", "", false}, {"cells", ""}, {"pending", ""}};
  for (const char* f : {"results.csv", "results.sqlite"})
    t.rows.push_back({{"file", (at / f).string()}, {"cells", done}, {"pending", r.count("pending")}});
  print(t, common.format);
  return kExitOk;
}

int run_report(const std::string& folder, const std::string& out) {
  require_writable(out);
  const ResultSet r = load_results(folder);
  for (const auto& p : r.problems) log_warning(p);
  write_report(r, out);
  std::printf("%s\n", out.c_str());
  return kExitOk;
}

}  // namespace vqkv::sweep
