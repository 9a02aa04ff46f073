#include "io/record_index.h"

#include <fmt/format.h>

#include <filesystem>

#include "core/error.h"

namespace vqkv {
namespace {

namespace fs = std::filesystem;

std::string index_path(const std::string& path) { return fs::path(path).replace_extension(".index").string(); }

Json facts_of(const Json& record) {
  Json facts = Json::object();
  for (const char* key : {"cell", "status", "attempt", "reason", "flags"})
    if (const auto it = record.find(key); it != record.end()) facts[key] = *it;
  return facts;
}

std::string index_line(const RecordEntry& e) {
  Json line = e.facts;
  line["at"] = e.at;
  line["bytes"] = e.bytes;
  return line.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
}

// A line of the index, or false: then it and what follows is not believed.
bool read_index_line(const std::string& line, int64_t from, int64_t size, RecordEntry& e) {
  try {
    e.facts = parse_json(line, "index");
    if (!e.facts.is_object()) return false;
    e.at = e.facts.at("at").get<int64_t>();
    e.bytes = e.facts.at("bytes").get<int64_t>();
    e.facts.erase("at");
    e.facts.erase("bytes");
  } catch (const std::exception&) { return false; }
  return e.at == from && e.bytes > 0 && e.bytes <= size && e.at <= size - e.bytes;
}

// The last record that an index names must be the one that stands there.
bool fits(const std::string& path, const RecordEntry& last) {
  try {
    return facts_of(RecordReader(path).read(last.at, last.bytes)) == last.facts;
  } catch (const Error&) { return false; }
}

}  // namespace

RecordIndex read_record_index(const std::string& path) {
  RecordIndex out;
  std::ifstream index(index_path(path), std::ios::binary);
  std::vector<std::string> lines;
  for (std::string line; std::getline(index, line);) lines.push_back(std::move(line));
  std::error_code ec;
  if (!fs::exists(path, ec)) return out;
  const auto size = static_cast<int64_t>(fs::file_size(path));
  std::ifstream in(path, std::ios::binary);
  if (!in) fail_data(fmt::format("{}: can't be read", path));
  int64_t end = 0;
  for (const std::string& line : lines) {
    RecordEntry e;
    if (!read_index_line(line, end, size, e)) break;
    end = e.at + e.bytes;
    out.entries.push_back(std::move(e));
  }
  if (!out.entries.empty() && !fits(path, out.entries.back())) {
    out.entries.clear();
    end = 0;
  }
  in.clear();
  in.seekg(end);
  for (auto [line, number] = std::pair<std::string, int64_t>("", std::ssize(out.entries) + 1); std::getline(in, line);
       ++number) {
    const bool finished = !in.eof();  // with its newline
    const RecordEntry e{end, static_cast<int64_t>(line.size()) + (finished ? 1 : 0), {}};
    end += e.bytes;
    const JsonlRead read = parse_jsonl(finished ? line + "\n" : line, fmt::format("{} at byte {}", path, e.at), number);
    out.torn = read.torn;
    if (read.records.empty()) continue;
    out.entries.push_back({e.at, e.bytes, facts_of(read.records[0])});
    ++out.read;
  }
  return out;
}

RecordReader::RecordReader(std::string path) : path_(std::move(path)), in_(path_, std::ios::binary) {}

Json RecordReader::read(int64_t at, int64_t bytes) {
  const std::string where = fmt::format("{} at byte {}", path_, at);
  std::string line(static_cast<size_t>(bytes), '\0');
  in_.clear();
  in_.seekg(at);
  in_.read(line.data(), bytes);
  if (in_.gcount() != bytes) fail_data(fmt::format("{}: can't be read", where));
  Json record = parse_json(line, where);
  if (!record.is_object()) fail_data(fmt::format("{}: a JSON object is expected", where));
  return record;
}

RecordWriter::RecordWriter(const std::string& path) : records_(path) {
  const RecordIndex have = read_record_index(path);  // the lock is ours: nobody else writes
  index_.open(index_path(path), std::ios::binary | std::ios::trunc);
  for (const RecordEntry& e : have.entries) index_ << index_line(e);
  index_.flush();
}

void RecordWriter::append(const Json& record) {
  RecordEntry e{records_.size(), 0, facts_of(record)};
  records_.append(record);
  e.bytes = records_.size() - e.at;
  index_ << index_line(e) << std::flush;
}

}  // namespace vqkv
