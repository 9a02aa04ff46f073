#include "io/gguf.h"

#include <cmath>
#include <functional>
#include <limits>

#include "core/error.h"
#include "support/catch.h"
#include "support/error_of.h"
#include "support/model_writers.h"

using namespace vqkv;
using namespace vqkv::testing;

namespace {

GgufBuilder small_gguf() {
  GgufBuilder b;
  b.text("general.architecture", "llama").u32("llama.block_count", 2).f32("llama.eps", 0.5f).flag("llama.flag", true);
  b.values.push_back({"list", raw(uint32_t{8}) + raw(uint64_t{2}) + gguf_text("one") + gguf_text("two"), 9});
  b.tensor("a", {2, 3}, {1, 2, 3, 4, 5, 6}).tensor("b", {4}, {7, 8, 9, 10});
  return b;
}

std::string gguf_error(const std::string& bytes) {
  const TempFolder folder;
  const std::string path = folder.write("m.gguf", bytes);
  try {
    GgufFile file(path);
  } catch (const Error& e) {
    CHECK(e.kind() == ErrorKind::kBadData);
    CHECK(std::string(e.what()).starts_with(path));
    return e.what();
  }
  return "";
}

// What a change to the small file is answered with.
std::string after(const std::function<void(GgufBuilder&)>& change) {
  GgufBuilder b = small_gguf();
  change(b);
  return gguf_error(b.build());
}

}  // namespace

TEST_CASE("a small GGUF reads back") {
  const TempFolder folder;
  for (const uint32_t version : {2u, 3u}) {
    GgufBuilder b = small_gguf();
    b.version = version;
    const GgufFile file(folder.write("m.gguf", b.build()));
    CHECK(file.version() == version);
    CHECK(file.integer("llama.block_count", 1, 10) == 2);
    CHECK(file.strings("list") == std::vector<std::string_view>{"one", "two"});
    REQUIRE(file.find_tensor("b") != nullptr);
    CHECK(file.find_tensor("b")->offset == file.data_offset() + 32);
    float v[4];
    ggml_dequantize(GgmlType::kF32, file.tensor_bytes(*file.find_tensor("b")).data(), v, 4);
    CHECK(v[3] == 10);
    CHECK(file.find_tensor("a")->shape == std::vector<int64_t>{2, 3});
    CHECK(file.find_tensor("c") == nullptr);
  }
}

TEST_CASE("typed access refuses wrong types, ranges and missing keys by name") {
  const TempFolder folder;
  GgufBuilder b = small_gguf();
  b.f32("nan", std::nanf(""));
  const GgufFile file(folder.write("m.gguf", b.build()));
  CHECK_THROWS_WITH(file.string("llama.block_count"),
                    Catch::Contains("llama.block_count") && Catch::Contains("u32 found, string expected"));
  CHECK_THROWS_WITH(file.integer("llama.eps", 0, 9), Catch::Contains("f32 found"));
  CHECK_THROWS_WITH(file.integer("llama.block_count", 3, 9), Catch::Contains("2 found, 3 to 9 are allowed"));
  CHECK_THROWS_WITH(file.integer("list", 3, 9), Catch::Contains("array of string found"));
  CHECK_THROWS_WITH(file.string("nothing"), Catch::Contains("\"nothing\" is missing"));
  CHECK_THROWS_WITH(file.integers("list"), Catch::Contains("array of integers expected"));
  CHECK_THROWS_WITH(file.floats("list"), Catch::Contains("array of f32 expected"));
  CHECK_THROWS_WITH(file.strings("llama.eps"), Catch::Contains("array of string expected"));
  CHECK_THROWS_WITH(file.boolean_or("llama.eps", true), Catch::Contains("bool expected"));
  CHECK_THROWS_WITH(file.number("nan"), Catch::Contains("not finite"));
  CHECK(file.integer_or("nothing", 0, 1, 7) == 7);
}

TEST_CASE("a GGUF cut at any byte is refused") {
  const TempFolder folder;
  const std::string whole = small_gguf().build();
  for (size_t n = 0; n < whole.size(); ++n) {
    const std::string path = folder.write("m.gguf", whole.substr(0, n));
    INFO("after " << n << " of " << whole.size() << " bytes");
    CHECK_THROWS_AS(GgufFile(path), Error);
  }
  check_says(gguf_error(whole.substr(0, whole.size() - 1)), {"tensor \"b\"", "beyond the file", "partial"});
}

TEST_CASE("hostile GGUF headers are refused by name") {
  check_says(gguf_error("GGML" + std::string(60, '\0')), {"magic", "\"GGML\" found"});
  check_says(gguf_error(""), {"is empty"});
  check_says(after([](auto& b) { b.version = 1; }), {"version", "1 found, 2 and 3"});
  check_says(after([](auto& b) { b.version = 0x03000000; }), {"big-endian"});
  check_says(after([](auto& b) { b.tensor_count = int64_t{1} << 60; }), {"tensor count", "1152921504606846976"});
  check_says(after([](auto& b) { b.tensor_count = std::numeric_limits<int64_t>::min(); }), {"tensor count"});
  check_says(after([](auto& b) { b.value_count = int64_t{1} << 40; }), {"key-value count"});
  check_says(after([](auto& b) { b.value_count = 6; }), {});
  check_says(after([](auto& b) { b.value_count = 4; }), {});
  check_says(after([](auto& b) { b.tensor_count = 3; }), {});
}

TEST_CASE("hostile GGUF key-values are refused by name") {
  check_says(after([](auto& b) { b.u32("llama.block_count", 3); }), {"llama.block_count", "stands twice"});
  check_says(after([](auto& b) { b.u32("", 3); }), {"an empty name"});
  check_says(after([](auto& b) { b.u32(std::string("a\0b", 3), 3); }), {"zero byte", "a\\x00b"});
  check_says(after([](auto& b) { b.u32(std::string(70000, 'k'), 3); }), {"70000", "65535"});
  check_says(after([](auto& b) { b.value("llama.eps").type = 13; }), {"llama.eps", "value type 13"});
  check_says(after([](auto& b) { b.value("llama.flag").payload = "\2"; }), {"llama.flag", "boolean 2"});
  check_says(after([](auto& b) {
               b.value("list").payload =
                   raw(uint32_t{9}) + raw(uint64_t{1}) + raw(uint32_t{4}) + raw(uint64_t{1}) + raw(uint32_t{1});
             }),
             {"list", "array of arrays"});
  check_says(after([](auto& b) { b.value("list").payload = raw(uint32_t{4}) + raw(~uint64_t{0}); }),
             {"list", "18446744073709551615"});
  check_says(after([](auto& b) { b.value("list").payload = raw(uint32_t{12}) + raw(uint64_t{1} << 61); }),
             {"list", "a count of"});
  check_says(after([](auto& b) { b.value("list").payload = raw(uint32_t{8}) + raw(uint64_t{1} << 50); }),
             {"list", "a count of"});
  check_says(after([](auto& b) { b.value("list").payload = raw(uint32_t{8}) + raw(uint64_t{1}) + raw(~uint64_t{0}); }),
             {"list", "length"});
  check_says(after([](auto& b) { b.u32("general.alignment", 24); }), {"general.alignment", "24 found", "power of two"});
  check_says(after([](auto& b) { b.u32("general.alignment", 0); }), {"general.alignment", "0 found"});
  check_says(after([](auto& b) { b.f32("general.alignment", 32); }), {"general.alignment", "f32 found, u32 expected"});
  CHECK(after([](auto& b) { b.u32("general.alignment", 64).alignment = 64; }).empty());
  check_says(after([](auto& b) { b.u32("general.alignment", 64); }), {});
}

TEST_CASE("hostile GGUF tensors are refused by name") {
  check_says(after([](auto& b) { b.at("b").name = "a"; }), {"tensor \"a\"", "stands twice"});
  check_says(after([](auto& b) { b.at("b").name = std::string(64, 'n'); }), {"64 bytes", "63"});
  check_says(after([](auto& b) { b.at("b").name = ""; }), {"an empty name"});
  check_says(after([](auto& b) { b.at("b").shape = {}; }), {"tensor \"b\"", "0 dimensions"});
  check_says(after([](auto& b) { b.at("b").shape = {1, 1, 1, 1, 4}; }), {"tensor \"b\"", "5 dimensions"});
  check_says(after([](auto& b) { b.at("b").shape = {0}; }), {"tensor \"b\"", "length 0"});
  check_says(after([](auto& b) { b.at("b").shape = {-4}; }), {"tensor \"b\"", "length -4"});
  check_says(after([](auto& b) {
               b.at("b").shape = {int64_t{1} << 32, int64_t{1} << 32};
             }),
             {"tensor \"b\"", "overflow"});
  check_says(after([](auto& b) { b.at("b").shape = {int64_t{1} << 62}; }), {"tensor \"b\"", "overflows"});
  check_says(after([](auto& b) { b.at("b").shape = {5}; }), {"tensor \"b\"", "beyond the file"});
  check_says(after([](auto& b) { b.at("b").type = 4; }), {"tensor \"b\"", "type 4", "Q4_K"});
  check_says(after([](auto& b) { b.at("b").type = 2; }), {"tensor \"b\"", "Q4_0 needs a multiple of 32"});
  check_says(after([](auto& b) { b.at("b").offset = 0; }), {"tensor \"b\"", "0 found, 32 expected"});    // overlap
  check_says(after([](auto& b) { b.at("b").offset = 64; }), {"tensor \"b\"", "64 found, 32 expected"});  // hole
  check_says(after([](auto& b) { b.at("b").offset = 33; }), {"tensor \"b\"", "33 found"});               // unaligned
  check_says(after([](auto& b) { b.at("a").offset = std::numeric_limits<int64_t>::max(); }), {"tensor \"a\""});
}

TEST_CASE("one flipped byte anywhere in a GGUF is read or refused, never a crash") {
  const TempFolder folder;
  const std::string whole = small_gguf().build();
  for (size_t i = 0; i < whole.size(); ++i) {
    for (const int flip : {0x01, 0x80, 0xff}) {
      std::string bytes = whole;
      bytes[i] = static_cast<char>(bytes[i] ^ flip);
      try {
        const GgufFile file(folder.write("m.gguf", bytes));
        for (const GgufTensor& t : file.tensors()) {
          std::vector<float> out(static_cast<size_t>(t.elements()));
          ggml_dequantize(t.type, file.tensor_bytes(t).data(), out.data(), t.elements());
        }
      } catch (const Error& e) { CHECK(e.kind() == ErrorKind::kBadData); }
    }
  }
}
