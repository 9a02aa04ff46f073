#include "metric/measurement.h"

#include <fmt/format.h>

#include "core/error.h"
#include "core/json.h"

namespace vqkv {
namespace {
constexpr const char* kBetterNames[] = {"lower", "higher", "neither"};
}

Json to_json(const Measurement& m) {
  Json j = {{"tag", m.tag}, {"value", m.value}, {"unit", m.unit}, {"stderr", m.stderr_}, {"n", m.n},
            {"better", kBetterNames[static_cast<int>(m.better)]}, {"exact", m.exact}};
  if (!m.per_document.empty()) j["per_document"] = m.per_document;
  return j;
}

Measurement measurement_from_json(const Json& j) {
  Measurement m;
  try {
    const auto number = [&](const char* key) {  // NaN and infinities are written as null
      return j.at(key).is_null() ? std::numeric_limits<double>::quiet_NaN() : j.at(key).get<double>();
    };
    m.tag = j.at("tag").get<std::string>();
    m.value = number("value");
    m.unit = j.at("unit").get<std::string>();
    m.stderr_ = number("stderr");
    m.n = j.at("n").get<int64_t>();
    const auto better = j.at("better").get<std::string>();
    m.better = better == "lower" ? Better::kLower : better == "higher" ? Better::kHigher : Better::kNeither;
    m.exact = j.at("exact").get<bool>();
    if (j.contains("per_document"))
      for (const auto& v : j.at("per_document"))
        m.per_document.push_back(v.is_null() ? std::numeric_limits<double>::quiet_NaN() : v.get<double>());
  } catch (const Json::exception& e) {
    fail_data(fmt::format("a measurement is malformed: {}", e.what()));
  }
  return m;
}

}  // namespace vqkv
