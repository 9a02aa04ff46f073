// config.json with typed, ranged access; private to lib/model.
#pragma once
#include <cstdint>
#include <optional>
#include <string>

#include "core/json.h"

namespace vqkv::model_files {

// null counts as missing, as in the configurations themselves. Everything else is kBadData naming file, key, what was
// found and what is allowed.
class Config {
 public:
  Config(Json json, std::string where);
  const std::string& where() const { return where_; }
  bool has(const std::string& key) const { return json_.contains(key) && !json_.at(key).is_null(); }
  bool says_null(const std::string& key) const { return json_.contains(key) && json_.at(key).is_null(); }
  const Json& json() const { return json_; }
  const Json& at(const std::string& key) const;
  [[noreturn]] void fail(const std::string& key, const std::string& allowed) const;
  int64_t integer(const std::string& key, int64_t lowest, int64_t highest) const;
  int64_t integer_or(const std::string& key, int64_t lowest, int64_t highest, int64_t fallback) const {
    return has(key) ? integer(key, lowest, highest) : fallback;
  }
  double number(const std::string& key, double lowest, double highest) const;
  double number_or(const std::string& key, double lowest, double highest, double fallback) const {
    return has(key) ? number(key, lowest, highest) : fallback;
  }
  bool boolean_or(const std::string& key, bool fallback) const;
  std::string string_or(const std::string& key, const std::string& fallback) const;
  std::optional<Config> object(const std::string& key) const;

 private:
  Json json_;
  std::string where_;
};

}  // namespace vqkv::model_files
