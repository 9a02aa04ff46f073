#include <fmt/format.h>

#include <cmath>

#include "codec/codec_archive.h"
#include "common/tool.h"
#include "core/error.h"
#include "core/log.h"
#include "core/names.h"
#include "core/version.h"
#include "experiment/choose.h"
#include "experiment/encode.h"
#include "experiment/judge.h"
#include "experiment/protocol.h"
#include "experiment/result_set.h"
#include "experiment/runner.h"
#include "io/atomic_file.h"
#include "verbs.h"

namespace vqkv::sweep {
namespace {

Json number(double v) { return std::isfinite(v) ? Json(v) : Json(); }

const CellResult& find_cell(const ResultSet& r, const std::string& id) {
  const CellResult* found = nullptr;
  std::vector<std::string> ids;
  for (const auto& c : r.cells) {
    ids.push_back(c.id());
    if (id.empty() || !c.cell.at("cell").get<std::string>().starts_with(id)) continue;
    if (found)
      fail_usage(fmt::format("--cell {}: several cells begin so, {} and {} among them", id, found->id(), c.id()));
    found = &c;
  }
  if (found) return *found;
  fail_usage(fmt::format("--cell: cell '{}' is not known{}; `vqkv-sweep status {} --cells` lists them", id,
                         did_you_mean(id, ids), r.folder));
}

}  // namespace

int run_best(const BestVerb& verb, const Common& common) {
  const ResultSet r = load_results(verb.folder);
  ChooseOptions o;
  o.budget = parse_budget(verb.budget);
  o.by = verb.by;
  o.column = verb.column;
  if (verb.sequences > 0 && verb.column != "shared")
    fail_usage(fmt::format("--sequences {}: sequences share constants in --column shared alone; --column is {}",
                           verb.sequences, verb.column));
  if (verb.sequences > 0) o.sequences = verb.sequences;
  if (!verb.context.empty()) o.context = parse_count(verb.context);
  if (!verb.context.empty() && o.context < 1) fail_usage("--context 0: no cache holds no token; allowed: 1 or more");
  const std::vector<Choice> found = choose(r, o);
  const int64_t context = o.context > 0 ? o.context : longest_context(r);
  const std::string at = verb.column == "codes"    ? "codes"
                         : verb.column == "shared" ? fmt::format("shared by {} at {}", o.sequences, context)
                                                   : fmt::format("resident at {}", context);
  Table t;
  t.columns = {{"id", "", "", false}};
  for (const auto& path : r.plan.at("axes")) t.columns.push_back({path.get<std::string>(), "", "", false});
  t.columns.push_back({"cost", fmt::format("{}, {}", o.budget.bytes ? "bytes" : "bits/value", at),
                       o.budget.bytes ? "{:.0f}" : "{:.3f}"});
  t.columns.push_back({"bits_per_value.codes", "codes+side bits", "{:.3f}"});
  Measurement by;
  by.tag = verb.by;
  if (!found.empty())
    if (const Json* m = found[0].cells[0]->find("select", verb.by)) by = measurement_head_from_json(*m);
  const std::string digits = fmt::format("{{:.{}g}}", by.digits);
  t.columns.push_back({"select", by.heading() + " (select)", digits});
  t.columns.push_back({"report", by.heading() + " (report)", digits});
  t.columns.push_back({"report_error", "± standard error", "{:.2g}"});
  t.columns.push_back({"n", "documents"});
  t.columns.push_back({"repeats", ""});
  t.columns.push_back({"protocol", "", "", false});
  t.columns.push_back({"flags", "", "", false});
  for (size_t i = 0; i < found.size() && static_cast<int>(i) < verb.top; ++i) {
    const Choice& c = found[i];
    const CellResult& cell = *c.cells[0];
    std::string flags;
    for (const auto& f : cell.record.value("flags", Json::array()))
      flags += (flags.empty() ? "" : " ") + f.get<std::string>();
    Json row = {{"id", cell.id()},
                {"cost", c.cost},
                {"bits_per_value.codes", number(cell.value("cost", "bits_per_value.codes"))},
                {"select", number(c.select)},
                {"report", number(c.report)},
                {"report_error", number(c.report_error)},
                {"n", c.n},
                {"repeats", c.cells.size()},
                {"protocol", protocol_of_cell(cell.cell.at("config"))},
                {"flags", flags}};
    for (const auto& [path, value] : cell.cell.at("axes").items())
      row[path] = value.is_structured() ? Json(value.dump()) : value;
    t.rows.push_back(std::move(row));
  }
  print(t, common.format);
  if (found.empty()) log_warning(fmt::format("no finished cell fits {} ({})", verb.budget, at));
  return kExitOk;
}

int run_export(const ExportVerb& verb, const Common& common) {
  require_writable(verb.out);
  const ResultSet r = load_results(verb.folder, Records::kStatus);
  const CellResult& c = find_cell(r, verb.cell);
  Json line;
  for_each_planned(r, [&](size_t i, Json&& planned) {
    if (&r.cells[i] == &c) line = std::move(planned);
  });
  const Json& config = line.at("config");
  if (c.flagged("subsampled") || config.at("layers") != "all" || config.at("heads") != "all")
    fail_usage(fmt::format("cell {} was trained on some layers or heads only; a codec file holds all of them", c.id()));
  const auto codecs = codecs_of_cell(
      line, [] { return interrupted(); }, verb.folder);
  if (!codecs) return kExitOk;
  save_codec_set(*codecs, verb.out,
                 {{"cell", line.at("cell")},
                  {"config", config},
                  {"cache", config.at("cache")},
                  {"trace", line.at("trace")},
                  {"tool", version_facts()},
                  {"command", common.command}});
  Table t;
  t.columns = {{"file", "", "", false}, {"cell", "", "", false}, {"units", ""}, {"constant_bytes", ""}};
  t.rows = {{{"file", verb.out},
             {"cell", c.id()},
             {"units", codecs->units().size()},
             {"constant_bytes", codecs->constant_bytes()}}};
  print(t, common.format);
  return kExitOk;
}

int run_judge(const JudgeVerb& verb, const Common& common) {
  JudgeOptions o;
  o.trace = verb.trace;
  o.recon = verb.recon;
  o.bytes = verb.bytes;
  o.overrides = verb.overrides;
  o.stop = [] { return interrupted(); };
  const Json record = judge(o);
  if (record.is_null()) return kExitOk;
  Table t;
  t.columns = {{"tag", "", "", false},  {"value", "", "{:.5g}"},   {"stderr", "", "{:.2g}"},   {"n", ""},
               {"unit", "", "", false}, {"better", "", "", false}, {"protocol", "", "", false}};
  for (Json m : record.at("measurements")) {
    for (const char* big : {"details", "per_document"})
      if (common.format != TableFormat::kJson) m.erase(big);
    if (m.value("n", int64_t{0}) < 2) m["stderr"] = nullptr;  // one document gives none
    if (m.at("role") == "report") m["protocol"] = record.at("protocol");
    t.rows.push_back(std::move(m));
  }
  print(t, common.format);
  return kExitOk;
}

int run_encode(const EncodeVerb& verb, const Common& common) {
  const Json counts = encode({.codecs = verb.codecs,
                              .trace = verb.trace,
                              .out = verb.out,
                              .overrides = verb.overrides,
                              .provenance = {{"tool", version_facts()}, {"command", common.command}},
                              .stop = [] { return interrupted(); }});
  if (counts.is_null()) return kExitOk;
  Table t;
  t.columns = {{"file", "", "", false}, {"windows", ""}, {"units", ""}, {"tokens", "coded tokens"}};
  t.rows = {counts};
  t.rows[0]["file"] = verb.out;
  print(t, common.format);
  return kExitOk;
}

}  // namespace vqkv::sweep
