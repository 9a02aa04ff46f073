#include "metric/measurement.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>

#include "core/json.h"
#include "io/json_fields.h"

namespace vqkv {
namespace {
constexpr std::initializer_list<const char*> kBetterNames{"lower", "higher", "neither"};
constexpr std::initializer_list<const char*> kShownNames{"nowhere", "value", "with error"};

template <class Enum>
Enum named(const std::initializer_list<const char*>& names, const std::string& name) {
  return static_cast<Enum>(std::find(names.begin(), names.end(), name) - names.begin());
}
}  // namespace

Json to_json(const Measurement& m) {
  Json j = {{"tag", m.tag},        {"value", m.value}, {"unit", m.unit},
            {"stderr", m.stderr_}, {"n", m.n},         {"better", kBetterNames.begin()[static_cast<int>(m.better)]},
            {"exact", m.exact}};
  const Measurement plain;
  if (!m.title.empty()) j["title"] = m.title;
  if (!m.group.empty()) j["group"] = m.group;
  if (m.digits != plain.digits) j["digits"] = m.digits;
  if (m.shown != plain.shown) j["shown"] = kShownNames.begin()[static_cast<int>(m.shown)];
  if (!m.per_document.empty()) j["per_document"] = m.per_document;
  for (const auto& d : m.details) j["details"].push_back({{"axis", d.axis}, {"shape", d.shape}, {"values", d.values}});
  return j;
}

Measurement measurement_head_from_json(const Json& j, const std::string& where) {
  Measurement m;
  m.tag = text_field(j, "tag", where);
  m.value = number_field(j, "value", where);
  m.unit = text_field(j, "unit", where);
  m.stderr_ = number_field(j, "stderr", where);
  m.n = integer_field(j, "n", 0, INT64_MAX, where);
  m.better = named<Better>(kBetterNames, choice_field(j, "better", kBetterNames, where));
  m.exact = boolean_field(j, "exact", where);
  if (j.contains("title")) m.title = text_field(j, "title", where);
  if (j.contains("group")) m.group = text_field(j, "group", where);
  if (j.contains("digits")) m.digits = static_cast<int>(integer_field(j, "digits", 1, 17, where));
  if (j.contains("shown")) m.shown = named<Shown>(kShownNames, choice_field(j, "shown", kShownNames, where));
  return m;
}

Measurement titled(Measurement m, std::string title, Shown shown, int digits) {
  m.title = std::move(title);
  m.shown = shown;
  m.digits = digits;
  return m;
}

void add_column(std::vector<MeasureColumn>& columns, const Measurement& m) {
  if (m.shown == Shown::kNowhere) return;
  auto it = std::find_if(columns.begin(), columns.end(), [&](const MeasureColumn& c) { return c.tag == m.tag; });
  if (it == columns.end()) it = columns.insert(it, {m.tag, m.heading(), m.group, m.digits, false});
  it->error = it->error || (m.shown == Shown::kWithError && m.n > 1 && m.stderr_ > 0);
}

std::string measure_text(double value, int digits) {
  return std::isfinite(value) ? fmt::format("{:.{}g}", value, digits) : std::string("–");
}

}  // namespace vqkv
