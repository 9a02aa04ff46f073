// One table, four syntaxes, one schema behind all of them.
#pragma once
#include <string>
#include <vector>

#include "core/json.h"

namespace vqkv {

struct Column {
  std::string key;          // JSON and CSV name
  std::string title;        // markdown heading; empty: the key
  std::string format = "";  // fmt spec for numbers in markdown ("{:.4g}"); CSV and JSON keep full precision
  bool right = true;        // numbers to the right
};

struct Table {
  std::vector<Column> columns;
  std::vector<Json> rows;  // objects by key; a missing key prints empty
};

enum class TableFormat { kMarkdown, kCsv, kJson, kJsonl };
TableFormat table_format_from_name(const std::string& name);  // md|csv|json|jsonl, else kUsage
std::string render(const Table& table, TableFormat format);
// To stdout. A terminal narrower than a markdown table gets the rows one below the other instead.
void print(const Table& table, TableFormat format);
// A table whose --json is `full`, the rows with what holds for all of them. True where people read it: notes may
// follow.
bool print(const Table& table, TableFormat format, const Json& full);

// 1536 -> "1.5 KiB"
std::string human_bytes(double bytes);
// "4k" -> 4096, "32K", "1m", plain numbers; kUsage otherwise
int64_t parse_count(const std::string& text);
// What `flag` was given, each once: a second one is kUsage, as in the lists of a configuration.
std::vector<int64_t> parse_counts(const std::string& flag, const std::string& comma_separated);

}  // namespace vqkv
