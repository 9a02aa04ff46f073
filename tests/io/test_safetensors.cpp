#include "io/safetensors.h"

#include "core/error.h"
#include "support/catch.h"
#include "support/error_of.h"
#include "support/model_writers.h"

using namespace vqkv;
using namespace vqkv::testing;

namespace {

std::string safetensors_error(const std::string& bytes) {
  const TempFolder folder;
  const std::string path = folder.write("m.safetensors", bytes);
  try {
    SafetensorsFile file(path);
  } catch (const Error& e) {
    CHECK(e.kind() == ErrorKind::kBadData);
    CHECK(std::string(e.what()).starts_with(path));
    return e.what();
  }
  return "";
}
std::string header_message(const std::string& header, size_t data_bytes = 24) {
  return safetensors_error(safetensors_bytes(header, std::string(data_bytes, 'x')));
}
SafetensorsBuilder small_safetensors() {
  SafetensorsBuilder b;
  b.tensor("a", {2, 2}, {1, 2, 3, 4}).tensor("b", {2}, {5, 6});
  b.header["__metadata__"] = {{"format", "pt"}};
  return b;
}

}  // namespace

TEST_CASE("a small safetensors file reads back") {
  const TempFolder folder;
  const SafetensorsFile file(folder.write("m.safetensors", small_safetensors().build()));
  REQUIRE(file.find("b") != nullptr);
  float v[2];
  file.read(*file.find("b"), v);
  CHECK(v[1] == 6);
  CHECK(file.find("a")->shape == std::vector<int64_t>{2, 2});
  CHECK(file.find("c") == nullptr);
}

TEST_CASE("a safetensors file cut at any byte is refused") {
  const TempFolder folder;
  const std::string whole = small_safetensors().build();
  for (size_t n = 0; n < whole.size(); ++n) {
    const std::string path = folder.write("m.safetensors", whole.substr(0, n));
    CHECK_THROWS_AS(SafetensorsFile(path), Error);
  }
  check_says(safetensors_error(whole.substr(0, whole.size() - 1)), {"tensor \"b\"", "beyond the file", "partial"});
  check_says(safetensors_error(whole + "x"), {"24 bytes", "25 after its header"});
}

TEST_CASE("hostile safetensors headers are refused by name") {
  check_says(safetensors_error(raw(uint64_t{100'000'001}) + "{}"), {"100000001", "100000000"});
  check_says(safetensors_error(raw(~uint64_t{0}) + "{}"), {"18446744073709551615"});
  check_says(safetensors_error(raw(uint64_t{3}) + "{}"), {"ends after 2"});
  check_says(header_message("[]"), {"'{'"});
  check_says(header_message(""), {"'{'"});
  check_says(header_message("{\"a\": "), {"not valid JSON"});
  check_says(header_message("{\"a\": 1}"), {"tensor \"a\"", "an object"});
  check_says(header_message("{\"__metadata__\": {\"n\": 1}}", 0), {"__metadata__", "not a string"});
  const std::string a = R"({"a": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]})";
  CHECK(header_message(a + "}").empty());
  check_says(header_message(a + R"(, "a": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}})"),
             {"stands twice"});
  check_says(header_message(a + R"(, "b": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}})"), {"overlaps"});
  check_says(header_message(a + R"(, "b": {"dtype": "F32", "shape": [1], "data_offsets": [20, 24]}})"), {"overlaps"});
  const auto one = [](const std::string& entry) { return header_message("{\"a\": {" + entry + "}}"); };
  check_says(one(R"("dtype": "F32", "shape": [6])"), {"\"a\"", "data_offsets is missing"});
  check_says(one(R"("dtype": "F33", "shape": [6], "data_offsets": [0, 24])"), {"\"F33\""});
  check_says(one(R"("dtype": 3, "shape": [6], "data_offsets": [0, 24])"), {"dtype"});
  check_says(one(R"("dtype": "F32", "shape": 6, "data_offsets": [0, 24])"), {"shape"});
  check_says(one(R"("dtype": "F32", "shape": [-6], "data_offsets": [0, 24])"), {"-6"});
  check_says(one(R"("dtype": "F32", "shape": [6.0], "data_offsets": [0, 24])"), {"6.0"});
  check_says(one(R"("dtype": "F32", "shape": [5], "data_offsets": [0, 24])"), {"24 bytes", "needs 20"});
  check_says(one(R"("dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 24])"), {"overflows"});
  check_says(one(R"("dtype": "F32", "shape": [4611686018427387904], "data_offsets": [0, 24])"), {"overflows"});
  check_says(one(R"("dtype": "F32", "shape": [5], "data_offsets": [4, 24])"), {"hole"});
  check_says(one(R"("dtype": "F32", "shape": [6], "data_offsets": [24, 0])"), {"begin <= end"});
  check_says(one(R"("dtype": "F32", "shape": [7], "data_offsets": [0, 28])"), {"beyond the file"});
  check_says(one(R"("dtype": "F32", "shape": [6], "data_offsets": [0, 24], "more": 1)"), {"\"more\""});
  check_says(one(R"("dtype": "F32", "shape": [1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,6], "data_offsets": [0, 24])"),
             {"at most 16"});
}

TEST_CASE("shards: every tensor in its file, every file there, no way out of the folder") {
  const auto fold = [](const Json& map, bool second = true) {
    const TempFolder folder;
    SafetensorsBuilder one, two;
    one.tensor("a", {1}, {1});
    two.tensor("b", {1}, {2});
    folder.write("m-1.safetensors", one.build());
    if (second) folder.write("m-2.safetensors", two.build());
    folder.write("model.safetensors.index.json", Json{{"weight_map", map}}.dump());
    try {
      const SafetensorsFolder files(folder.path());
      CHECK(files.names() == std::vector<std::string>{"a", "b"});
      float v = 0;
      const auto place = files.find("b");
      place.file->read(*place.tensor, &v);
      CHECK(v == 2);
    } catch (const Error& e) {
      CHECK(e.kind() == ErrorKind::kBadData);
      return std::string(e.what());
    }
    return std::string();
  };
  CHECK(fold({{"a", "m-1.safetensors"}, {"b", "m-2.safetensors"}}).empty());
  check_says(fold({{"a", "m-1.safetensors"}, {"b", "m-2.safetensors"}}, false),
             {"m-2.safetensors is missing", "partial"});
  check_says(fold({{"a", "m-1.safetensors"}, {"b", "m-1.safetensors"}}), {"\"b\" is not in its shard"});
  check_says(fold({{"a", "m-2.safetensors"}, {"b", "m-2.safetensors"}}), {});
  check_says(fold({{"b", "m-2.safetensors"}, {"c", "m-1.safetensors"}}), {"\"a\"", "not listed"});
  check_says(fold({{"a", "../m-1.safetensors"}, {"b", "m-2.safetensors"}}), {"the name of a file in the same folder"});
  check_says(fold({{"a", 3}}), {"the name of a file"});
  check_says(fold(Json::object()), {"weight_map"});
  check_says(fold(Json::array()), {"weight_map"});
  const TempFolder empty;
  CHECK_THROWS_WITH(SafetensorsFolder(empty.path()), Catch::Contains("neither model.safetensors"));
}
