#include "io/json_fields.h"

#include <fmt/format.h>

#include "core/error.h"
#include "core/json.h"

namespace vqkv {

int64_t integer_field(const Json& j, const char* key, int64_t low, int64_t high, const std::string& where) {
  const auto it = j.is_object() ? j.find(key) : j.end();
  if (it == j.end() || !it->is_number_integer()) fail_data(fmt::format("{}: '{}' must be an integer", where, key));
  const int64_t v =
      it->is_number_unsigned() && it->get<uint64_t>() > uint64_t{INT64_MAX} ? INT64_MAX : it->get<int64_t>();
  if (v < low || v > high) fail_data(fmt::format("{}: '{}' is {}; allowed: {} to {}", where, key, v, low, high));
  return v;
}

std::string text_field(const Json& j, const char* key, const std::string& where) {
  const auto it = j.is_object() ? j.find(key) : j.end();
  if (it == j.end() || !it->is_string()) fail_data(fmt::format("{}: '{}' must be text", where, key));
  return it->get<std::string>();
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
