#include "experiment/choose.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <map>
#include <set>

#include "core/error.h"
#include "core/names.h"

namespace vqkv {

Budget parse_budget(const std::string& text) {
  Budget b;
  const auto r = std::from_chars(text.data(), text.data() + text.size(), b.limit);
  const std::string unit(r.ptr, text.data() + text.size());
  const std::map<std::string, double> units = {{"B", 1.0}, {"KiB", 0x1p10}, {"MiB", 0x1p20}, {"GiB", 0x1p30}};
  if (r.ec != std::errc() || !std::isfinite(b.limit) || b.limit <= 0 || (unit != "bpv" && !units.contains(unit)))
    fail_usage(
        fmt::format("'{}' is not a budget; write bits a value (2.5bpv) or bytes (64KiB, 512MiB, 1GiB, 1000B)", text));
  if (unit != "bpv") {
    b.limit *= units.at(unit);
    b.bytes = true;
  }
  return b;
}

int64_t longest_context(const ResultSet& results) {
  int64_t longest = 0;
  for (const auto& c : results.cells)
    for (const auto& x : c.cell.at("config").at("contexts")) longest = std::max(longest, x.get<int64_t>());
  return longest;
}

std::vector<Choice> choose(const ResultSet& results, const ChooseOptions& options) {
  if (options.column != "resident" && options.column != "shared" && options.column != "codes")
    fail_usage(fmt::format("--column {}: resident, shared or codes", options.column));
  if (options.column == "codes" && options.budget.bytes)
    fail_usage("--column codes is in bits a value; write the budget as 2.5bpv");
  const int64_t context = options.context > 0 ? options.context : longest_context(results);
  const auto cost_of = [&](const CellResult& c) {
    if (options.column == "codes") return c.value("cost", "bits_per_value.codes");
    return c.value("cost", options.budget.bytes ? "bytes" : "bits_per_value", context,
                   options.column == "shared" ? options.sequences : 0);
  };
  std::map<std::string, Choice> groups;
  std::set<std::string> tags;
  bool any_ok = false, higher = false, any_cost = false;
  for (const auto& c : results.cells) {
    if (c.status() != "ok") continue;
    any_ok = true;
    for (const auto& m : c.record["measurements"])
      if (m.value("role", "") == "select") tags.insert(m.value("tag", ""));
    const Json* m = c.find("select", options.by);
    const double cost = cost_of(c), value = c.value("select", options.by);
    any_cost = any_cost || std::isfinite(cost);
    if (!m || !std::isfinite(value) || !std::isfinite(cost)) continue;
    higher = m->value("better", "") == "higher";
    if (cost <= options.budget.limit) groups[c.cell.at("group").get<std::string>()].cells.push_back(&c);
  }
  if (!any_ok) fail_usage(fmt::format("{} holds no finished cell yet", results.folder));
  if (tags.empty())
    fail_usage("nothing was measured on select documents (trace.select); report documents are never chosen on");
  if (!tags.contains(options.by)) fail_unknown("--by: measure", options.by, {tags.begin(), tags.end()});
  if (!any_cost)
    fail_usage(fmt::format("no cell has byte columns for a context of {} tokens and {} sequences", context,
                           options.sequences));
  std::vector<Choice> out;
  for (auto& [group, c] : groups) {
    const double n = static_cast<double>(c.cells.size());
    double square = 0, error = 0;
    for (const CellResult* cell : c.cells) {
      c.cost = std::max(c.cost, cost_of(*cell));
      c.select += cell->value("select", options.by) / n;
      c.report += cell->value("report", options.by) / n;
      if (const Json* m = cell->find("report", options.by)) {
        if (m->contains("stderr") && (*m)["stderr"].is_number()) error += (*m)["stderr"].get<double>() / n;
        c.n = m->value("n", int64_t{0});
      }
    }
    for (const CellResult* cell : c.cells) square += std::pow(cell->value("select", options.by) - c.select, 2);
    c.spread = n > 1 ? std::sqrt(square / (n - 1)) : 0;
    c.report_error = c.n > 1 ? error : std::nan("");
    out.push_back(std::move(c));
  }
  std::sort(out.begin(), out.end(), [&](const Choice& a, const Choice& b) {
    if (a.select != b.select) return higher ? a.select > b.select : a.select < b.select;
    if (a.cost != b.cost) return a.cost < b.cost;
    return a.cells[0]->id() < b.cells[0]->id();
  });
  return out;
}

}  // namespace vqkv
