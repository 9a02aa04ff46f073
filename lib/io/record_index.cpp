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
  line["at"] = e.place.at;
  line["bytes"] = e.place.bytes;
  return line.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
}

// A line of the index, or false: then it and what follows is not believed.
bool read_index_line(const std::string& line, int64_t from, int64_t size, RecordEntry& e) {
  try {
    e.facts = parse_json(line, "index");
    if (!e.facts.is_object()) return false;
    e.place.at = e.facts.at("at").get<int64_t>();
    e.place.bytes = e.facts.at("bytes").get<int64_t>();
    e.facts.erase("at");
    e.facts.erase("bytes");
  } catch (const std::exception&) { return false; }
  const auto& [at, bytes, number] = e.place;
  return at == from && bytes > 0 && bytes <= size && at <= size - bytes;
}

// Is an index of these records as they stand? Then they were written before it, and the last one that it names is
// there, as a whole line.
bool fits(const std::string& path, const RecordEntry& last) {
  if (fs::last_write_time(path) > fs::last_write_time(index_path(path))) return false;
  std::ifstream in(path, std::ios::binary);
  in.seekg(last.place.at + last.place.bytes - 1);
  if (in.get() != '\n') return false;
  try {
    return facts_of(RecordReader(path).read(last.place)) == last.facts;
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
    end = e.place.at + e.place.bytes;
    e.place.line = std::ssize(out.entries) + 1;
    out.entries.push_back(std::move(e));
  }
  if (!out.entries.empty() && !fits(path, out.entries.back())) {
    out.entries.clear();
    end = 0;
  }
  in.clear();
  in.seekg(end);
  int64_t number = std::ssize(out.entries);
  for (std::string line; std::getline(in, line);) {
    const bool finished = !in.eof();  // with its newline
    const RecordPlace place{end, static_cast<int64_t>(line.size()) + (finished ? 1 : 0), ++number};
    end += place.bytes;
    const JsonlRead read =
        parse_jsonl(finished ? line + "\n" : line, fmt::format("{} at byte {}", path, place.at), number);
    out.torn = read.torn;
    if (read.records.empty()) continue;
    out.entries.push_back({place, facts_of(read.records[0])});
    ++out.read;
  }
  return out;
}

RecordReader::RecordReader(std::string path) : path_(std::move(path)), in_(path_, std::ios::binary) {}

std::string RecordPlace::in(const std::string& path) const {
  return fmt::format("{} at byte {} line {}", path, at, line);
}

Json RecordReader::read(const RecordPlace& place) {
  const std::string where = place.in(path_);
  std::string line(static_cast<size_t>(place.bytes), '\0');
  in_.clear();
  in_.seekg(place.at);
  in_.read(line.data(), place.bytes);
  if (in_.gcount() != place.bytes) fail_data(fmt::format("{}: can't be read", where));
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
  RecordEntry e{{.at = records_.size()}, facts_of(record)};
  records_.append(record);
  e.place.bytes = records_.size() - e.place.at;
  index_ << index_line(e) << std::flush;
}

}  // namespace vqkv
