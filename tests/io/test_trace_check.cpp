#include "io/trace_check.h"

#include <sys/stat.h>

#include <fstream>

#include "core/error.h"
#include "io/atomic_file.h"
#include "support/catch.h"
#include "trace_fixture.h"

using namespace vqkv;

namespace {

std::string verify_refusal(const std::string& path) {
  try {
    open_verified_trace(path);
  } catch (const Error& e) {
    CHECK(e.kind() == ErrorKind::kBadData);
    return e.what();
  }
  return "";
}

// Changes a byte far behind the header: some value.
void edit(const std::string& path) {
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  file.seekg(0, std::ios::end);
  const auto at = static_cast<std::streamoff>(file.tellg()) / 2;
  file.seekg(at);
  const int old = file.get();
  file.seekp(at);
  file.put(static_cast<char>(old ^ 1));
}

// Writes into `record` that the file as it stands now was verified.
void forge(const std::string& path, const std::string& record) {
  struct stat s {};
  REQUIRE(::stat(path.c_str(), &s) == 0);
  const auto nanoseconds = [](const timespec& t) { return int64_t{t.tv_sec} * 1'000'000'000 + t.tv_nsec; };
  Json state = Json::parse(read_file(record));
  REQUIRE(state.contains("content_xxh3"));
  state["size"] = static_cast<int64_t>(s.st_size);
  state["modified_ns"] = nanoseconds(s.st_mtim);
  state["changed_ns"] = nanoseconds(s.st_ctim);
  state["inode"] = static_cast<uint64_t>(s.st_ino);
  std::ofstream(record) << state.dump() << "\n";
}

}  // namespace

TEST_CASE("a trace is verified once a state of its file", "[trace][verified]") {
  const TempDir dir("verified");
  const std::string path = dir / "t.trace.h5", record = path + ".verified";
  write_trace(path, DType::kBF16, 10, 0);
  CHECK(verify_refusal(path).empty());
  const std::string first = read_file(record);
  CHECK(first.find(TraceReader(path).info().content_hash) != std::string::npos);

  edit(path);
  CHECK_THAT(verify_refusal(path), Catch::Contains(path) && Catch::Contains("its values were changed"));
  CHECK(read_file(record) == first);
  // A remembered state is believed: with the record of the edited file forged, its values are not read.
  forge(path, record);
  CHECK(verify_refusal(path).empty());
  std::filesystem::remove(record);
  CHECK_THAT(verify_refusal(path), Catch::Contains("its values were changed"));
  edit(path);  // back
  CHECK(verify_refusal(path).empty());
  CHECK(read_file(record) != first);  // another time of modification
  const std::string second = read_file(record);
  CHECK(verify_refusal(path).empty());
  CHECK(read_file(record) == second);

  // A copy under the same name is another file; a torn record says nothing.
  std::filesystem::copy_file(path, dir / "copy.h5");
  std::filesystem::rename(dir / "copy.h5", path);
  CHECK(verify_refusal(path).empty());
  CHECK(read_file(record) != second);
  std::ofstream(record) << "{\"size\":";
  CHECK(verify_refusal(path).empty());
  CHECK(Json::parse(read_file(record)).contains("inode"));
}

TEST_CASE("what is no trace leaves no record, and one that can't be kept is no error", "[trace][verified]") {
  const TempDir dir("unverified");
  std::ofstream(dir / "text.h5") << "no trace";
  CHECK_THAT(verify_refusal(dir / "text.h5"), Catch::Contains("can't be opened as HDF5"));
  CHECK_FALSE(std::filesystem::exists(dir / "text.h5.verified"));
  const std::string path = dir / "t.trace.h5";
  write_trace(path, DType::kBF16, 10, 0);
  std::filesystem::create_directory(path + ".verified");  // stands in for a folder that can't be written
  CHECK(verify_refusal(path).empty());
  edit(path);
  CHECK_THAT(verify_refusal(path), Catch::Contains("its values were changed"));
}
