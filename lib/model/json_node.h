// A value of a JSON file that knows where it stands, for messages. Private to lib/model.
#pragma once
#include <fmt/format.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/error.h"
#include "core/json.h"

namespace vqkv {

class JsonNode {
 public:
  JsonNode(const Json& json, std::string path) : json_(&json), path_(std::move(path)) {}
  const Json& json() const { return *json_; }
  const std::string& path() const { return path_; }
  bool is_null() const { return json_->is_null(); }

  [[noreturn]] void fail(const std::string& what) const { fail_data(fmt::format("{}: {}", path_, what)); }

  JsonNode at(const char* key) const {
    static const Json kNull;
    if (!json_->is_object()) fail(fmt::format("is {}; wanted an object", json_->type_name()));
    const auto it = json_->find(key);
    return {it == json_->end() ? kNull : *it, fmt::format("{} {}", path_, key)};
  }
  std::vector<JsonNode> items() const {
    if (!json_->is_array()) fail(fmt::format("is {}; wanted an array", json_->type_name()));
    std::vector<JsonNode> out;
    out.reserve(json_->size());
    for (size_t i = 0; i < json_->size(); ++i) out.emplace_back((*json_)[i], fmt::format("{}[{}]", path_, i));
    return out;
  }
  std::string text() const {
    if (!json_->is_string()) fail(fmt::format("is {}; wanted a string", json_->type_name()));
    return json_->get<std::string>();
  }
  std::string text_or_empty() const { return is_null() ? std::string() : text(); }
  bool boolean_or(bool fallback) const {
    if (is_null()) return fallback;
    if (!json_->is_boolean()) fail(fmt::format("is {}; wanted true or false", json_->type_name()));
    return json_->get<bool>();
  }
  std::optional<bool> boolean() const { return is_null() ? std::nullopt : std::optional(boolean_or(false)); }
  int64_t integer(int64_t lowest, int64_t highest) const {
    if (!json_->is_number_integer()) fail(fmt::format("is {}; wanted an integer", json_->type_name()));
    const bool huge = json_->is_number_unsigned() && json_->get<uint64_t>() > uint64_t{INT64_MAX};
    const int64_t value = huge ? INT64_MAX : json_->get<int64_t>();
    if (value < lowest || value > highest) fail(fmt::format("is {}; allowed are {} to {}", value, lowest, highest));
    return value;
  }

 private:
  const Json* json_;
  std::string path_;
};

}  // namespace vqkv
