// The tables of papers: each number beside what the ledger computes at its shape, and beside what result files measured
// under its conditions or under others.
#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <optional>
#include <set>

#include "common/tool.h"
#include "core/log.h"
#include "core/names.h"
#include "experiment/paper_measured.h"
#include "experiment/paper_tables.h"
#include "verbs.h"

namespace vqkv::eval {
namespace {

// A number with what stands beside it.
struct Beside {
  const PaperNumber* number = nullptr;
  std::optional<double> computed;
  std::vector<const MeasuredNumber*> own;  // under its conditions
  struct Other {
    const MeasuredNumber* measured = nullptr;
    std::vector<std::string> unmet;
  };
  std::vector<Other> others;
};

std::vector<MeasuredNumber> read_files(const std::vector<std::string>& files) {
  refuse_twice("--measured", files);
  std::vector<MeasuredNumber> out;
  for (const std::string& file : files)
    for (MeasuredNumber& n : read_measured(file)) out.push_back(std::move(n));
  return out;
}

Beside find_beside(const PaperNumber& number, const std::vector<MeasuredNumber>& measured, bool compute) {
  Beside b;
  b.number = &number;
  if (compute && is_computed(number)) b.computed = computed_value(number);
  for (const MeasuredNumber& m : measured)
    if (auto unmet = unmet_conditions(number, m)) {
      if (unmet->empty())
        b.own.push_back(&m);
      else
        b.others.push_back({&m, std::move(*unmet)});
    }
  return b;
}

std::string value_text(const MeasuredNumber& m) {
  return fmt::format("{:.5g}{}", m.value, m.of_exact ? fmt::format(" (exact cache {:.5g})", *m.of_exact) : "");
}

std::string own_text(const Beside& b) {
  std::vector<std::string> each;
  for (const MeasuredNumber* m : b.own) each.push_back(value_text(*m));
  return fmt::format("{}", fmt::join(each, "; "));
}

std::string others_text(const Beside& b) {
  std::vector<std::string> each;
  for (const auto& o : b.others)
    each.push_back(fmt::format("{}: {}", value_text(*o.measured), fmt::join(o.unmet, ", ")));
  return fmt::format("{}", fmt::join(each, "; "));
}

std::string shape_text(const PaperNumber& n) {
  if (!n.shape) return "";
  return fmt::format("{}: {} layers, {} KV heads of {}", n.shape_name, n.shape->layers, n.shape->kv_heads,
                     n.shape->head_dim);
}

std::string mind_text(const PaperNumber& n) {
  const std::string unconfirmed = n.unconfirmed.empty() ? "" : "unconfirmed: " + n.unconfirmed;
  return unconfirmed + (unconfirmed.empty() || n.remark.empty() ? "" : "; ") + n.remark;
}

std::string model_text(const PaperNumber& n) { return n.models.empty() ? "" : n.models[0]; }

// One row of the flat table.
Json row_of(const Paper& paper, const PaperTable& table, const Beside& b) {
  const PaperNumber& n = *b.number;
  return {{"paper", paper.name},
          {"table", table.id},
          {"method", n.method},
          {"what", n.what},
          {"by", table.by_formula ? "formula" : "paper"},
          {"value", n.value},
          {"quantity", n.quantity},
          {"computed", b.computed ? Json(*b.computed) : Json()},
          {"measured", own_text(b)},
          {"other", others_text(b)},
          {"model", model_text(n)},
          {"shape", shape_text(n)},
          {"mind", mind_text(n)},
          {"source", n.source},
          {"needs", is_computed(n) ? "" : table.needs},
          {"fill", is_computed(n) ? "" : table.fill}};
}

Json json_of(const Beside& b) {
  const PaperNumber& n = *b.number;
  Json own = Json::array(), others = Json::array();
  for (const MeasuredNumber* m : b.own) own.push_back(m->to_json());
  for (const auto& o : b.others) {
    Json j = o.measured->to_json();
    j["unmet"] = o.unmet;
    others.push_back(std::move(j));
  }
  const auto known = [](const auto& value, bool there) { return there ? Json(value) : Json(); };
  return {{"method", n.method},
          {"what", n.what},
          {"value", n.value},
          {"quantity", known(n.quantity, !n.quantity.empty())},
          {"computed", b.computed ? Json(*b.computed) : Json()},
          {"measured", own},
          {"other", others},
          {"models", n.models},
          {"texts", n.texts},
          {"mode", known(n.mode, !n.mode.empty())},
          {"context", known(n.context, n.context > 0)},
          {"tokens", known(n.tokens, n.tokens > 0)},
          {"strategy", known(n.strategy, !n.strategy.empty())},
          {"codec", n.codec},
          {"cache", n.cache},
          {"shape", known(shape_text(n), n.shape.has_value())},
          {"unconfirmed", known(n.unconfirmed, !n.unconfirmed.empty())},
          {"remark", known(n.remark, !n.remark.empty())},
          {"source", n.source}};
}

// What all rows say alike stands above the table.
std::string common(const std::vector<Json>& rows, const char* key) {
  const auto same = [&](const Json& row) { return row[key] == rows[0][key]; };
  return std::ranges::all_of(rows, same) ? rows[0][key].get<std::string>() : "";
}

void print_for_people(const PaperTable& table, std::vector<Json> rows) {
  std::string head = fmt::format("\n## {}/{}: {}\n\n", rows[0]["paper"].get<std::string>(), table.id, table.title);
  const auto say = [&](const char* lead, const std::string& text) {
    if (!text.empty()) head += lead + text + ".\n";
  };
  say("Model: ", common(rows, "model"));
  say("At ", common(rows, "shape"));
  say("Protocol: ", table.protocol);
  say("Mind: ", common(rows, "mind"));
  say("Source: ", common(rows, "source"));
  std::fputs((head + "\n").c_str(), stdout);

  Table t{{{"method", "method", "", false}, {"what", "of", "", false}}, {}};
  t.columns.push_back({"value", table.by_formula ? "formula" : "paper"});
  const auto add = [&](const char* key, const char* title, const char* format, bool right) {
    const auto empty = [&](const Json& row) { return row[key].is_null() || row[key] == ""; };
    if (!std::ranges::all_of(rows, empty)) t.columns.push_back({key, title, format, right});
  };
  add("computed", "our ledger", "{:.5g}", true);
  const auto is_of_command = [](const Json& row) { return row["needs"] != "" && row["quantity"] != ""; };
  if (std::ranges::any_of(rows, is_of_command)) t.columns.push_back({"measured", "measured under these conditions"});
  add("other", "measured under others: no reproduction", "", false);
  for (const char* key : {"model", "shape", "mind", "source"})
    if (common(rows, key).empty()) add(key, key, "", false);
  t.rows = std::move(rows);
  print(t, TableFormat::kMarkdown);
  if (!table.needs.empty())
    std::fputs(fmt::format("\nNeeds {}.\nFilled by: {}.\n", table.needs, table.fill).c_str(), stdout);
}

void warn_of_strangers(const std::vector<MeasuredNumber>& measured, const std::vector<Paper>& papers) {
  std::set<std::string> strangers, found;
  for (const MeasuredNumber& m : measured) {
    strangers.insert(m.file);
    for (const Paper& p : papers)
      for (const PaperTable& t : p.tables)
        for (const PaperNumber& n : t.numbers)
          if (unmet_conditions(n, m)) found.insert(m.file);
  }
  for (const std::string& file : strangers)
    if (!found.contains(file))
      log_warning(
          fmt::format("{}: no number of these tables has the method, settings and metric of one of its rows", file));
}

}  // namespace

int run_tables(const TablesVerb& v) {
  const std::vector<Paper> papers = find_papers(v.papers);
  const std::vector<MeasuredNumber> measured = read_files(v.measured);
  Json full = Json::array();
  Table flat;
  for (const char* key : {"paper", "table", "method", "what", "by", "value", "quantity", "computed", "measured",
                          "other", "model", "shape", "mind", "source", "needs", "fill"})
    flat.columns.push_back({key, key});
  bool first = true;
  for (const Paper& p : papers) {
    if (v.format == TableFormat::kMarkdown)
      std::fputs(fmt::format("{}# {} (arXiv {}, {})\n", first ? "" : "\n", p.title, p.arxiv, p.venue).c_str(), stdout);
    first = false;
    Json tables = Json::array();
    for (const PaperTable& t : p.tables) {
      if (interrupted()) return kExitOk;
      Json numbers = Json::array();
      std::vector<Json> rows;
      for (const PaperNumber& n : t.numbers) {
        const Beside b = find_beside(n, measured, true);
        numbers.push_back(json_of(b));
        rows.push_back(row_of(p, t, b));
      }
      tables.push_back({{"id", t.id},
                        {"title", t.title},
                        {"by", t.by_formula ? "formula" : "paper"},
                        {"protocol", t.protocol},
                        {"needs", t.needs},
                        {"fill", t.fill},
                        {"numbers", numbers}});
      flat.rows.insert(flat.rows.end(), rows.begin(), rows.end());
      if (v.format == TableFormat::kMarkdown) print_for_people(t, std::move(rows));
    }
    full.push_back({{"paper", p.name}, {"title", p.title}, {"arxiv", p.arxiv}, {"venue", p.venue}, {"tables", tables}});
  }
  warn_of_strangers(measured, papers);
  if (v.format != TableFormat::kMarkdown) print(flat, v.format, {{"papers", full}});
  return kExitOk;
}

int list_tables(const TablesVerb& v) {
  const std::vector<MeasuredNumber> measured = read_files(v.measured);
  Table table{{{"paper", "paper", "", false},
               {"arxiv", "arXiv", "", false},
               {"title", "title", "", false},
               {"tables", "tables"},
               {"numbers", "numbers"},
               {"computed", "by our ledger"},
               {"commands", "by a command"},
               {"measured", "measured"},
               {"unconfirmed", "unconfirmed"}},
              {}};
  for (const Paper& p : find_papers(v.papers)) {
    int64_t numbers = 0, computed = 0, commands = 0, found = 0, unconfirmed = 0;
    for (const PaperTable& t : p.tables)
      for (const PaperNumber& n : t.numbers) {
        ++numbers;
        computed += is_computed(n);
        commands += is_measured(n);
        found += !find_beside(n, measured, false).own.empty();
        unconfirmed += !n.unconfirmed.empty();
      }
    table.rows.push_back({{"paper", p.name},
                          {"arxiv", p.arxiv},
                          {"title", p.title},
                          {"tables", p.tables.size()},
                          {"numbers", numbers},
                          {"computed", computed},
                          {"commands", commands},
                          {"measured", found},
                          {"unconfirmed", unconfirmed}});
  }
  print(table, v.format);
  return kExitOk;
}

}  // namespace vqkv::eval
