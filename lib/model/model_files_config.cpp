#include "model/model_files_config.h"

#include <fmt/format.h>

#include "core/error.h"

namespace vqkv::model_files {

Config::Config(Json json, std::string where) : json_(std::move(json)), where_(std::move(where)) {
  if (!json_.is_object()) fail_data(fmt::format("{}: not a JSON object", where_));
}

const Json& Config::at(const std::string& key) const {
  if (!has(key)) fail_data(fmt::format("{}: \"{}\" is missing", where_, key));
  return json_.at(key);
}

void Config::fail(const std::string& key, const std::string& allowed) const {
  std::string found = at(key).dump(-1, ' ', true, Json::error_handler_t::replace);
  if (found.size() > 80) found = found.substr(0, 80) + "...";
  fail_data(fmt::format("{}: \"{}\" is {}, {}", where_, key, found, allowed));
}

int64_t Config::integer(const std::string& key, int64_t lowest, int64_t highest) const {
  const Json& value = at(key);
  const bool fits = value.is_number_integer() &&
                    (!value.is_number_unsigned() || value.get<uint64_t>() <= static_cast<uint64_t>(INT64_MAX)) &&
                    value.get<int64_t>() >= lowest && value.get<int64_t>() <= highest;
  if (!fits) fail(key, fmt::format("an integer from {} to {} is allowed", lowest, highest));
  return value.get<int64_t>();
}

double Config::number(const std::string& key, double lowest, double highest) const {
  const Json& value = at(key);
  if (!value.is_number() || !(value.get<double>() >= lowest && value.get<double>() <= highest))
    fail(key, fmt::format("a number from {} to {} is allowed", lowest, highest));
  return value.get<double>();
}

bool Config::boolean_or(const std::string& key, bool fallback) const {
  if (!has(key)) return fallback;
  if (!at(key).is_boolean()) fail(key, "true or false is allowed");
  return at(key).get<bool>();
}

std::string Config::string_or(const std::string& key, const std::string& fallback) const {
  if (!has(key)) return fallback;
  if (!at(key).is_string()) fail(key, "a string is allowed");
  return at(key).get<std::string>();
}

std::optional<Config> Config::object(const std::string& key) const {
  if (!has(key)) return std::nullopt;
  if (!at(key).is_object()) fail(key, "an object is allowed");
  return Config(at(key), fmt::format("{}: {}", where_, key));
}

}  // namespace vqkv::model_files
