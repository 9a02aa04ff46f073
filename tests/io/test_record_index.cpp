#include "io/record_index.h"

#include <fmt/format.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <functional>

#include "core/error.h"
#include "io/atomic_file.h"
#include "support/catch.h"
#include "support/error_of.h"
#include "trace_fixture.h"

using namespace vqkv;

namespace {

Json record(int i, const std::string& status = "ok") {
  return {{"cell", fmt::format("c{}", i)},
          {"status", status},
          {"attempt", 1},
          {"flags", {"extrapolated"}},
          {"measurements", std::string(2000, 'x')}};
}
std::vector<Json> facts(const RecordIndex& index) {
  std::vector<Json> out;
  for (const RecordEntry& e : index.entries) out.push_back(e.facts);
  return out;
}
struct Store {
  TempDir dir{"record-index"};
  std::string path = dir / "main.jsonl", index = dir / "main.index";
  explicit Store(int records) {
    RecordWriter writer(path);
    for (int i = 0; i < records; ++i) writer.append(record(i));
  }
  std::vector<Json> whole() const {
    std::vector<Json> out;
    RecordReader reader(path);
    for (const RecordEntry& e : read_record_index(path).entries) out.push_back(reader.read(e.place));
    return out;
  }
};

}  // namespace

TEST_CASE("what is asked of records is read from their index, the records one by one", "[store][index]") {
  const Store s(20);
  const RecordIndex index = read_record_index(s.path);
  CHECK(index.read == 0);
  CHECK(index.torn.empty());
  REQUIRE(index.entries.size() == 20);
  CHECK(index.entries[7].facts == Json::parse(R"({"cell":"c7","status":"ok","attempt":1,"flags":["extrapolated"]})"));
  CHECK(s.whole() == parse_jsonl(read_file(s.path), s.path).records);
  CHECK(std::filesystem::file_size(s.index) < std::filesystem::file_size(s.path) / 10);

  // A record in the middle is not looked at until it is asked for, where the file is older than its index.
  const auto written = std::filesystem::last_write_time(s.index);
  std::string text = read_file(s.path);
  text[static_cast<size_t>(index.entries[7].place.at) + 200] = '"';
  write_file(s.path, text);
  std::filesystem::last_write_time(s.path, written);
  CHECK(facts(read_record_index(s.path)) == facts(index));
  CHECK_THAT(data_error_of([&] { s.whole(); }),
             Catch::Contains(fmt::format("{} at byte {} line 8", s.path, index.entries[7].place.at)));
  CHECK(read_record_index(s.dir / "absent.jsonl").entries.empty());
}

TEST_CASE("records that were changed after their index are read, not believed", "[store][index]") {
  const Store s(20);
  std::string text = read_file(s.path);
  const RecordPlace place = read_record_index(s.path).entries[7].place;
  const auto edited = [&](const std::string& from, const std::string& to) {
    std::string changed = text;
    changed.replace(changed.find(from, static_cast<size_t>(place.at)), from.size(), to);
    write_file(s.path, changed);
    return read_record_index(s.path).entries[7].facts.dump();
  };
  const auto written = std::filesystem::last_write_time(s.index);
  std::filesystem::last_write_time(s.index, written - std::chrono::seconds(1));
  CHECK_THAT(edited("\"ok\"", "\"OK\""), Catch::Contains("\"OK\""));  // as many bytes
  std::filesystem::last_write_time(s.index, written + std::chrono::hours(1));
  CHECK_THAT(edited("\"ok\"", "\"OK.\""), Catch::Contains("\"OK.\""));  // what follows moves by one byte
}

TEST_CASE("an index that is absent, torn, behind or of other records costs time alone", "[store][index]") {
  const Store s(20);
  const std::vector<Json> expected = facts(read_record_index(s.path));
  const std::string good = read_file(s.index), records = read_file(s.path);
  const auto with_index = [&](const std::string& text) {
    write_file(s.index, text);
    const RecordIndex index = read_record_index(s.path);
    CHECK(facts(index) == expected);
    return index.read;
  };
  std::filesystem::remove(s.index);
  CHECK(read_record_index(s.path).read == 20);
  CHECK(with_index(good) == 0);
  CHECK(with_index(good.substr(0, good.size() - 30)) == 1);
  CHECK(with_index(good.substr(0, good.size() / 2)) > 5);
  CHECK(with_index("not json\n" + good) == 20);
  CHECK(with_index("{}\n") == 20);
  CHECK(with_index("[1]\n") == 20);
  CHECK(with_index(R"({"at":-5,"bytes":10,"cell":"c0"})"
                   "\n") == 20);
  CHECK(with_index(R"({"at":0,"bytes":9223372036854775807,"cell":"c0"})"
                   "\n") == 20);
  CHECK(with_index(good.substr(good.find('\n') + 1)) <= 20);  // its first line is gone

  // A line taken out by hand: the index no longer fits.
  write_file(s.index, good);
  write_file(s.path, records.substr(records.find('\n') + 1));
  CHECK(facts(read_record_index(s.path)) == std::vector<Json>(expected.begin() + 1, expected.end()));

  // The writer mends it.
  { RecordWriter writer(s.path); }
  CHECK(read_record_index(s.path).read == 0);
}

TEST_CASE("a record that a kill tore is cut off with its index, one that only lacks its newline is kept",
          "[store][index]") {
  const Store s(5);
  const std::string records = read_file(s.path);
  write_file(s.path, records.substr(0, records.size() - 10));
  const RecordIndex torn = read_record_index(s.path);
  CHECK(torn.entries.size() == 4);
  CHECK_THAT(torn.torn, Catch::Contains("line 5") && Catch::Contains("unfinished record"));
  {
    RecordWriter writer(s.path);
    writer.append(record(9, "failed"));
  }
  const RecordIndex mended = read_record_index(s.path);
  CHECK(mended.read == 0);
  CHECK(mended.torn.empty());
  REQUIRE(mended.entries.size() == 5);
  CHECK(mended.entries[4].facts["status"] == "failed");
  CHECK(s.whole() == parse_jsonl(read_file(s.path), s.path).records);

  const std::string whole = read_file(s.path);
  write_file(s.path, whole.substr(0, whole.size() - 1));
  CHECK(read_record_index(s.path).entries.size() == 5);
  {
    RecordWriter writer(s.path);
    writer.append(record(10));
  }
  CHECK(read_record_index(s.path).entries.size() == 6);
  CHECK(s.whole() == parse_jsonl(read_file(s.path), s.path).records);
}

TEST_CASE("a hundred thousand records are indexed once", "[store][index]") {
  const TempDir dir("many-records");
  const std::string path = dir / "main.jsonl";
  {
    std::ofstream out(path);
    for (int i = 0; i < 100'000; ++i)
      out << R"({"cell":"c)" << i << R"(","status":"ok","attempt":1,"measurements":[0.5,0.25,0.125]})"
          << "\n";
  }
  CHECK(read_record_index(path).read == 100'000);
  { RecordWriter writer(path); }
  const RecordIndex index = read_record_index(path);
  CHECK(index.read == 0);
  REQUIRE(index.entries.size() == 100'000);
  CHECK(index.entries.back().facts["cell"] == "c99999");
}
