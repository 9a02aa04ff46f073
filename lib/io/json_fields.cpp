#include "io/json_fields.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>

#include "core/error.h"
#include "core/json.h"

namespace vqkv {
namespace {

template <class Is>
const Json& field(const Json& j, const char* key, const std::string& where, Is is, const char* what) {
  const auto it = j.is_object() ? j.find(key) : j.end();
  if (it == j.end()) fail_data(fmt::format("{}: '{}' is missing; {} is expected", where, key, what));
  if (!is(*it)) fail_data(fmt::format("{}: '{}' must be {}", where, key, what));
  return *it;
}

}  // namespace

int64_t integer_field(const Json& j, const char* key, int64_t low, int64_t high, const std::string& where) {
  const Json& f = field(
      j, key, where, [](const Json& x) { return x.is_number_integer(); }, "an integer");
  const int64_t v = f.is_number_unsigned() && f.get<uint64_t>() > uint64_t{INT64_MAX} ? INT64_MAX : f.get<int64_t>();
  if (v < low || v > high) fail_data(fmt::format("{}: '{}' is {}; allowed: {} to {}", where, key, v, low, high));
  return v;
}

double number_field(const Json& j, const char* key, const std::string& where) {
  const auto is = [](const Json& x) { return x.is_number() || x.is_null(); };
  const Json& f = field(j, key, where, is, "a number, or null");
  return f.is_null() ? std::numeric_limits<double>::quiet_NaN() : f.get<double>();
}

bool boolean_field(const Json& j, const char* key, const std::string& where) {
  return field(
             j, key, where, [](const Json& x) { return x.is_boolean(); }, "true or false")
      .get<bool>();
}

std::string text_field(const Json& j, const char* key, const std::string& where) {
  return field(
             j, key, where, [](const Json& x) { return x.is_string(); }, "text")
      .get<std::string>();
}

const Json& map_field(const Json& j, const char* key, const std::string& where) {
  return field(
      j, key, where, [](const Json& x) { return x.is_object(); }, "a map");
}

const Json& list_field(const Json& j, const char* key, bool (*is)(const Json&), const char* what,
                       const std::string& where) {
  return field(
      j, key, where, [&](const Json& x) { return x.is_array() && std::all_of(x.begin(), x.end(), is); }, what);
}

std::string choice_field(const Json& j, const char* key, std::initializer_list<const char*> allowed,
                         const std::string& where) {
  const std::string value = text_field(j, key, where);
  std::string list;
  for (const char* a : allowed) {
    if (value == a) return value;
    list += (list.empty() ? "" : ", ") + std::string(a);
  }
  fail_data(fmt::format("{}: '{}' is \"{}\"; allowed: {}", where, key, value, list));
}

}  // namespace vqkv
