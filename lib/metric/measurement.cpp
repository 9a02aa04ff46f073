#include "metric/measurement.h"

#include <fmt/format.h>

#include <cmath>
#include <limits>

#include "core/error.h"
#include "core/json.h"

namespace vqkv {
namespace {
constexpr const char* kBetterNames[] = {"lower", "higher", "neither"};

double number(const Json& j) {  // JSON has no NaN: it is written as null
  return j.is_null() ? std::numeric_limits<double>::quiet_NaN() : j.get<double>();
}

std::vector<double> numbers(const Json& j) {
  std::vector<double> out;
  for (const auto& v : j) out.push_back(number(v));
  return out;
}
}  // namespace

Json to_json(const Measurement& m) {
  Json j = {{"tag", m.tag},        {"value", m.value}, {"unit", m.unit},
            {"stderr", m.stderr_}, {"n", m.n},         {"better", kBetterNames[static_cast<int>(m.better)]},
            {"exact", m.exact}};
  if (!m.per_document.empty()) j["per_document"] = m.per_document;
  for (const auto& d : m.details) j["details"].push_back({{"axis", d.axis}, {"shape", d.shape}, {"values", d.values}});
  return j;
}

Measurement measurement_from_json(const Json& j) {
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
    if (j.contains("per_document")) m.per_document = numbers(j.at("per_document"));
    if (j.contains("details"))
      for (const auto& d : j.at("details"))
        m.details.push_back(
            {d.at("axis").get<std::string>(), d.at("shape").get<std::vector<int64_t>>(), numbers(d.at("values"))});
  } catch (const Json::exception& e) { fail_data(fmt::format("a measurement is malformed: {}", e.what())); }
  return m;
}

}  // namespace vqkv
