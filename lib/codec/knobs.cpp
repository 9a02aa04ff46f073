#include "codec/knobs.h"

#include <fmt/format.h>

#include <algorithm>

#include "config/config.h"
#include "core/error.h"
#include "core/json.h"
#include "core/names.h"
#include "core/whole_number.h"

namespace vqkv {
namespace {

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
                      if (!whole || *whole < low || *whole > high) fail_expected(name, "an integer in " + range, v);
                      *value = static_cast<int>(*whole);
                    }});
  return *this;
}

KnobTable& KnobTable::real(std::string name, double* value, double low, double high, std::string help) {
  const std::string range = fmt::format("{}..{}", low, high);
  knobs_.push_back({name, std::move(help), "float", range, [value] { return Json(*value); },
                    [name, value, low, high, range](const Json& v) {
                      if (!v.is_number()) fail_expected(name, "a number in " + range, v);
                      const double d = v.get<double>();
                      if (!(d >= low && d <= high)) fail_expected(name, "a number in " + range, v);
                      *value = d;
                    }});
  return *this;
}

KnobTable& KnobTable::boolean(std::string name, bool* value, std::string help) {
  knobs_.push_back({name, std::move(help), "bool", "true|false", [value] { return Json(*value); },
                    [name, value](const Json& v) {
                      if (!v.is_boolean()) fail_expected(name, "true or false", v);
                      *value = v.get<bool>();
                    }});
  return *this;
}

KnobTable& KnobTable::choice(std::string name, std::string* value, std::vector<std::string> allowed, std::string help) {
  const std::string range = joined(allowed);
  knobs_.push_back({name, std::move(help), "choice", range, [value] { return Json(*value); },
                    [name, value, allowed](const Json& v) {
                      const std::string text = v.is_string() ? v.get<std::string>() : v.dump();
                      if (!v.is_string() || std::find(allowed.begin(), allowed.end(), text) == allowed.end())
                        fail_unknown(name + ":", text, allowed);
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
  if (!values.is_object()) fail_expected(path, "a map of `key: value` pairs", values);
  for (const auto& [key, value] : values.items()) {
    const auto knob = std::find_if(knobs_.begin(), knobs_.end(), [&](const Knob& k) { return k.name == key; });
    if (knob == knobs_.end()) {
      std::vector<std::string> names;
      for (const Knob& k : knobs_) names.push_back(k.name);
      fail_unknown_key(path, key, names);
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
