#include "codec/knobs.h"

#include <fmt/format.h>

#include <algorithm>

#include "core/error.h"
#include "core/json.h"
#include "core/whole_number.h"

namespace vqkv {
namespace {

[[noreturn]] void wrong_value(const std::string& name, const Json& value, const std::string& allowed) {
  fail_usage(fmt::format("{}: {} is not allowed; it takes {}", name, value.dump(), allowed));
}

std::string joined(const std::vector<std::string>& words) {
  std::string out;
  for (const std::string& w : words) out += (out.empty() ? "" : "|") + w;
  return out;
}

}  // namespace

KnobTable& KnobTable::integer(std::string name, int* value, int low, int high, std::string help) {
  const std::string range = fmt::format("{}..{}", low, high);
  knobs_.push_back({name, std::move(help), "int", range, [value] { return Json(*value); },
                    [name, value, low, high, range](const Json& v) {
                      const std::optional<int64_t> whole = whole_number(v);
                      if (!whole || *whole < low || *whole > high) wrong_value(name, v, "a whole number in " + range);
                      *value = static_cast<int>(*whole);
                    }});
  return *this;
}

KnobTable& KnobTable::real(std::string name, double* value, double low, double high, std::string help) {
  const std::string range = fmt::format("{}..{}", low, high);
  knobs_.push_back({name, std::move(help), "float", range, [value] { return Json(*value); },
                    [name, value, low, high, range](const Json& v) {
                      if (!v.is_number()) wrong_value(name, v, "a number in " + range);
                      const double d = v.get<double>();
                      if (!(d >= low && d <= high)) wrong_value(name, v, "a number in " + range);
                      *value = d;
                    }});
  return *this;
}

KnobTable& KnobTable::boolean(std::string name, bool* value, std::string help) {
  knobs_.push_back({name, std::move(help), "bool", "true|false", [value] { return Json(*value); },
                    [name, value](const Json& v) {
                      if (!v.is_boolean()) wrong_value(name, v, "true or false");
                      *value = v.get<bool>();
                    }});
  return *this;
}

KnobTable& KnobTable::choice(std::string name, std::string* value, std::vector<std::string> allowed, std::string help) {
  const std::string range = joined(allowed);
  knobs_.push_back(
      {name, std::move(help), "choice", range, [value] { return Json(*value); },
       [name, value, allowed, range](const Json& v) {
         if (!v.is_string()) wrong_value(name, v, "one of " + range);
         const auto text = v.get<std::string>();
         if (std::find(allowed.begin(), allowed.end(), text) == allowed.end()) {
           const std::string near = nearest_name(text, allowed);
           wrong_value(name, v, "one of " + range + (near.empty() ? "" : fmt::format(" (did you mean '{}'?)", near)));
         }
         *value = text;
       }});
  return *this;
}

KnobTable& KnobTable::effort() {
  VQKV_CHECK(!knobs_.empty() && knobs_.back().type == "int");
  knobs_.back().effort = true;
  return *this;
}

void KnobTable::apply(const Json& values, const std::string& path) {
  if (values.is_null()) return;
  if (!values.is_object())
    fail_usage(fmt::format("{}: expected knobs as `name: value` pairs, found {}", path, values.dump()));
  for (const auto& [key, value] : values.items()) {
    const auto knob = std::find_if(knobs_.begin(), knobs_.end(), [&](const Knob& k) { return k.name == key; });
    if (knob == knobs_.end()) {
      std::vector<std::string> names;
      for (const Knob& k : knobs_) names.push_back(k.name);
      const std::string near = nearest_name(key, names);
      fail_usage(fmt::format("{}: unknown key '{}'{}; allowed: {}", path, key,
                             near.empty() ? "" : fmt::format(", did you mean '{}'?", near), joined(names)));
    }
    try {
      knob->set(value);
    } catch (const Error& e) { throw Error(e.kind(), path + "." + e.what()); }
  }
}

Json KnobTable::values() const {
  Json out = Json::object();
  for (const Knob& k : knobs_) out[k.name] = k.get();
  return out;
}

}  // namespace vqkv
