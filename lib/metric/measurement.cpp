#include "metric/measurement.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/error.h"
#include "core/json.h"

namespace vqkv {
namespace {
constexpr const char* kBetterNames[] = {"lower", "higher", "neither"};
constexpr const char* kShownNames[] = {"nowhere", "value", "with error"};

double number(const Json& j) {  // JSON has no NaN: it is written as null
  return j.is_null() ? std::numeric_limits<double>::quiet_NaN() : j.get<double>();
}
}  // namespace

Json to_json(const Measurement& m) {
  Json j = {{"tag", m.tag},        {"value", m.value}, {"unit", m.unit},
            {"stderr", m.stderr_}, {"n", m.n},         {"better", kBetterNames[static_cast<int>(m.better)]},
            {"exact", m.exact}};
  const Measurement plain;
  if (!m.title.empty()) j["title"] = m.title;
  if (!m.group.empty()) j["group"] = m.group;
  if (m.digits != plain.digits) j["digits"] = m.digits;
  if (m.shown != plain.shown) j["shown"] = kShownNames[static_cast<int>(m.shown)];
  if (!m.per_document.empty()) j["per_document"] = m.per_document;
  for (const auto& d : m.details) j["details"].push_back({{"axis", d.axis}, {"shape", d.shape}, {"values", d.values}});
  return j;
}

Measurement measurement_head_from_json(const Json& j) {
  Measurement m;
  try {
    m.tag = j.at("tag").get<std::string>();
    m.value = number(j.at("value"));
    m.unit = j.at("unit").get<std::string>();
    m.stderr_ = number(j.at("stderr"));
    m.n = j.at("n").get<int64_t>();
    const auto better = j.at("better").get<std::string>();
    m.better = better == "lower" ? Better::kLower : better == "higher" ? Better::kHigher : Better::kNeither;
    m.exact = j.at("exact").get<bool>();
    m.title = j.value("title", std::string());
    m.group = j.value("group", std::string());
    m.digits = std::clamp(j.value("digits", m.digits), 1, 17);
    const auto shown = j.value("shown", std::string());
    m.shown = shown == "nowhere" ? Shown::kNowhere : shown == "value" ? Shown::kValue : Shown::kWithError;
  } catch (const Json::exception& e) { fail_data(fmt::format("a measurement is malformed: {}", e.what())); }
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
