#include "common/table.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>

#include "core/error.h"
#include "core/names.h"
#include "core/terminal.h"

namespace vqkv {
namespace {

std::string plain_text(const Json& v) {
  if (v.is_null()) return "";
  if (v.is_string()) return v.get<std::string>();
  if (v.is_number_float()) return std::isfinite(v.get<double>()) ? canonical_json(v) : "nan";
  return v.dump();
}

// One line for people.
std::string shown_text(const Json& v, const Column& c) {
  if (v.is_number() && !c.format.empty()) return fmt::format(fmt::runtime(c.format), v.get<double>());
  std::string text = plain_text(v);
  std::replace(text.begin(), text.end(), '\n', ' ');
  return text;
}

std::string markdown_text(const Json& v, const Column& c) {
  std::string text = shown_text(v, c);
  for (size_t at = 0; (at = text.find('|', at)) != std::string::npos; at += 2) text.replace(at, 1, "\\|");
  return text;
}

std::string heading(const Column& c) { return c.title.empty() ? c.key : c.title; }

std::string csv_text(const Json& v) {
  const std::string text = plain_text(v);
  if (text.find_first_of(",\"\n\r") == std::string::npos) return text;
  std::string quoted = "\"";
  for (const char c : text) quoted += c == '"' ? std::string("\"\"") : std::string(1, c);
  return quoted + "\"";
}

Json cell(const Json& row, const std::string& key) { return row.contains(key) ? row.at(key) : Json(); }

// A row below the other, a line a column: what a terminal shows of a table wider than itself.
std::string upright(const Table& table) {
  size_t widest = 0;
  for (const auto& c : table.columns) widest = std::max(widest, text_columns(heading(c)));
  std::string out;
  for (const auto& r : table.rows) {
    if (!out.empty()) out += "\n";
    for (const auto& c : table.columns)
      out +=
          heading(c) + std::string(widest - text_columns(heading(c)) + 2, ' ') + shown_text(cell(r, c.key), c) + "\n";
  }
  return out;
}

}  // namespace

TableFormat table_format_from_name(const std::string& name) {
  if (name == "md") return TableFormat::kMarkdown;
  if (name == "csv") return TableFormat::kCsv;
  if (name == "json") return TableFormat::kJson;
  if (name == "jsonl") return TableFormat::kJsonl;
  fail_unknown("format", name, {"md", "csv", "json", "jsonl"});
}

std::string render(const Table& table, TableFormat format) {
  std::string out;
  if (format == TableFormat::kJson || format == TableFormat::kJsonl) {
    Json rows = Json::array();
    for (const auto& r : table.rows) rows.push_back(r);
    if (format == TableFormat::kJson) return rows.dump(2) + "\n";
    for (const auto& r : rows) out += r.dump() + "\n";
    return out;
  }
  if (format == TableFormat::kCsv) {
    for (size_t c = 0; c < table.columns.size(); ++c) out += (c ? "," : "") + csv_text(table.columns[c].key);
    out += "\n";
    for (const auto& r : table.rows) {
      for (size_t c = 0; c < table.columns.size(); ++c) out += (c ? "," : "") + csv_text(cell(r, table.columns[c].key));
      out += "\n";
    }
    return out;
  }
  std::vector<std::vector<std::string>> text;
  std::vector<size_t> widths;
  for (const auto& c : table.columns) widths.push_back(std::max<size_t>(3, text_columns(heading(c))));
  for (const auto& r : table.rows) {
    text.emplace_back();
    for (size_t c = 0; c < table.columns.size(); ++c) {
      text.back().push_back(markdown_text(cell(r, table.columns[c].key), table.columns[c]));
      widths[c] = std::max(widths[c], text_columns(text.back().back()));
    }
  }
  const auto line = [&](const std::vector<std::string>& cells) {
    out += "|";
    for (size_t c = 0; c < cells.size(); ++c) {
      const std::string pad(widths[c] - text_columns(cells[c]), ' ');
      out += table.columns[c].right ? " " + pad + cells[c] + " |" : " " + cells[c] + pad + " |";
    }
    out += "\n";
  };
  std::vector<std::string> heads;
  for (const auto& c : table.columns) heads.push_back(heading(c));
  line(heads);
  out += "|";
  for (size_t c = 0; c < table.columns.size(); ++c)
    out += (table.columns[c].right ? " " + std::string(widths[c] - 1, '-') + ": |"
                                   : " " + std::string(widths[c], '-') + " |");
  out += "\n";
  for (const auto& r : text) line(r);
  return out;
}

void print(const Table& table, TableFormat format) {
  std::string text = render(table, format);
  const size_t columns = terminal_columns(STDOUT_FILENO);
  if (format == TableFormat::kMarkdown && columns > 0 && !table.rows.empty() &&
      text_columns(text.substr(0, text.find('\n'))) > columns)
    text = upright(table);
  std::fwrite(text.data(), 1, text.size(), stdout);
}

bool print(const Table& table, TableFormat format, const Json& full) {
  if (format != TableFormat::kJson) {
    print(table, format);
    return format == TableFormat::kMarkdown;
  }
  std::fputs((full.dump(2) + "\n").c_str(), stdout);
  return false;
}

std::string human_bytes(double bytes) {
  const char* units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  int u = 0;
  while (std::fabs(bytes) >= 1024 && u < 4) {
    bytes /= 1024;
    ++u;
  }
  return u == 0 ? fmt::format("{:.0f} B", bytes) : fmt::format("{:.{}f} {}", bytes, bytes < 10 ? 2 : 1, units[u]);
}

int64_t parse_count(const std::string& text) {
  int64_t value = 0;
  const auto r = std::from_chars(text.data(), text.data() + text.size(), value);
  const std::string suffix(r.ptr, text.data() + text.size());
  int64_t factor = 0;
  if (suffix.empty())
    factor = 1;
  else if (suffix == "k" || suffix == "K")
    factor = 1024;
  else if (suffix == "m" || suffix == "M")
    factor = 1024 * 1024;
  int64_t product = 0;
  if (r.ec != std::errc() || factor == 0 || value < 0 || __builtin_mul_overflow(value, factor, &product))
    fail_usage(fmt::format("'{}' is not a count; write 4096, 4k or 1m", text));
  return product;
}

std::vector<int64_t> parse_counts(const std::string& flag, const std::string& text) {
  std::vector<int64_t> out;
  for (size_t at = 0; at <= text.size();) {
    const size_t comma = std::min(text.find(',', at), text.size());
    const std::string word = text.substr(at, comma - at);
    const int64_t count = parse_count(word);
    if (std::find(out.begin(), out.end(), count) != out.end())
      fail_usage(fmt::format("{} {}: {} stands twice", flag, text, word));
    out.push_back(count);
    at = comma + 1;
  }
  return out;
}

}  // namespace vqkv
