// Reads tests/golden/data/tokens/: see make_token_goldens.py and make_chat_goldens.py in tests/golden.
#pragma once
#include <string>
#include <vector>

#include "core/json.h"
#include "io/atomic_file.h"
#include "model/tokenizer.h"

namespace vqkv::testing {

inline std::string token_golden_path(const std::string& name) {
  return std::string(VQKV_SOURCE_DIR) + "/tests/golden/data/tokens/" + name;
}

inline Json token_golden(const std::string& name) {
  return parse_json(read_file(token_golden_path(name)), token_golden_path(name));
}

struct TokenComparison {
  int strings = 0, with_special = 0;
  std::vector<std::string> differences;  // one line each
};

inline std::string printed_ids(const std::vector<int32_t>& ids) { return Json(ids).dump().substr(0, 200); }

// Every string of strings.json, plain, and once more with special tokens recognised where the file says that it
// matters.
inline TokenComparison compare_tokens(const Tokenizer& tokenizer, const std::string& name, bool round_trip) {
  const Json strings = token_golden("strings.json"), golden = token_golden(name + ".ids.json");
  TokenComparison result;
  for (size_t i = 0; i < strings.size(); ++i) {
    const auto text = strings[i].get<std::string>();
    const auto check = [&](const std::vector<int32_t>& got, const std::vector<int32_t>& wanted, const char* what) {
      if (got != wanted) {
        result.differences.push_back(std::to_string(i) + " " + what + " " + strings[i].dump().substr(0, 80) + ": " +
                                     printed_ids(got) + " instead of " + printed_ids(wanted));
      }
    };
    const std::vector<int32_t> plain = tokenizer.encode(text);
    check(plain, golden["ids"][i].get<std::vector<int32_t>>(), "plain");
    ++result.strings;
    const std::string key = std::to_string(i);
    const bool differs = golden["special"].contains(key);
    check(tokenizer.encode(text, true),
          (differs ? golden["special"][key] : golden["ids"][i]).get<std::vector<int32_t>>(), "special");
    result.with_special += differs;
    if (round_trip && tokenizer.decode(plain) != text) result.differences.push_back(key + " does not decode to itself");
  }
  return result;
}

}  // namespace vqkv::testing
