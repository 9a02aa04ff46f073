// Files written by the formats' own packages (tests/golden/make_gguf_goldens.py) read back equal in every bit.
#include <bit>
#include <cstring>
#include <limits>

#include "core/json.h"
#include "io/atomic_file.h"
#include "io/gguf.h"
#include "io/safetensors.h"
#include "support/catch.h"

using namespace vqkv;

namespace {
const std::string kData = std::string(VQKV_SOURCE_DIR) + "/tests/golden/data/";
}

TEST_CASE("every GGUF tensor type dequantizes to the bits of the gguf package") {
  const GgufFile file(kData + "blocks.gguf");
  int types = 0;
  for (const GgufTensor& tensor : file.tensors()) {
    const GgufTensor* golden = file.find_tensor(tensor.name + ".f32");
    if (!golden) continue;
    INFO(tensor.name);
    ++types;
    CHECK(ggml_type_facts(tensor.type).name == tensor.name);
    REQUIRE(golden->type == GgmlType::kF32);
    REQUIRE(golden->shape == tensor.shape);
    std::vector<float> values(static_cast<size_t>(tensor.elements()));
    ggml_dequantize(tensor.type, file.tensor_bytes(tensor).data(), values.data(), tensor.elements());
    const auto expected = file.tensor_bytes(*golden);
    REQUIRE(expected.size() == values.size() * sizeof(float));
    int wrong = 0;
    for (size_t i = 0; i < values.size(); ++i) wrong += std::memcmp(&values[i], expected.data() + i * 4, 4) != 0;
    CHECK(wrong == 0);
  }
  CHECK(types == 13);  // all of 8.5 but F32 itself
  REQUIRE(file.find_tensor("F32") != nullptr);
  CHECK(file.find_tensor("F32")->shape == std::vector<int64_t>{2, 3, 5});
}

TEST_CASE("key-values of every type, as the gguf package writes them") {
  const GgufFile file(kData + "blocks.gguf");
  const auto whole = [&](const char* key) {
    return file.integer(key, std::numeric_limits<int64_t>::min(), std::numeric_limits<int64_t>::max());
  };
  CHECK(file.version() == 3);
  CHECK(file.string("general.architecture") == "golden");
  CHECK(whole("t.u8") == 200);
  CHECK(whole("t.i8") == -100);
  CHECK(whole("t.u16") == 60000);
  CHECK(whole("t.i16") == -30000);
  CHECK(whole("t.u32") == 4000000000);
  CHECK(whole("t.i32") == -2000000000);
  CHECK(whole("t.u64") == std::numeric_limits<int64_t>::max());
  CHECK_THROWS_WITH(whole("t.u64_big"), Catch::Contains("t.u64_big"));
  CHECK(whole("t.i64") == -(int64_t{1} << 62));
  CHECK(file.number("t.f32") == static_cast<double>(0.1f));
  CHECK(file.number("t.f64") == 0.1);
  CHECK(file.boolean_or("t.bool", false));
  CHECK(file.string("t.string") == "naïve 文字");
  CHECK(file.strings("t.strings") == std::vector<std::string_view>{"a", "", "βγ"});
  CHECK(file.integers("t.ints") == std::vector<int64_t>{1, -2, 3});
  CHECK(file.floats("t.floats") == std::vector<float>{0.5f, -0.25f});
}

TEST_CASE("safetensors as the safetensors package writes them") {
  const SafetensorsFile file(kData + "types.safetensors");
  const Json golden = parse_json(read_file(kData + "types.json"), "types.json");
  CHECK(file.metadata().at("format") == "pt");
  CHECK(file.tensors().size() == 5);
  for (const auto& [name, bits] : golden.items()) {
    INFO(name);
    const SafeTensor* tensor = file.find(name);
    REQUIRE(tensor != nullptr);
    REQUIRE(static_cast<size_t>(tensor->elements) == bits.size());
    std::vector<float> values(bits.size());
    file.read(*tensor, values.data());
    for (size_t i = 0; i < bits.size(); ++i) REQUIRE(std::bit_cast<uint32_t>(values[i]) == bits[i].get<uint32_t>());
  }
  CHECK(file.find("e.empty")->shape == std::vector<int64_t>{0, 3});
  float unused[2];
  CHECK_THROWS_WITH(file.read(*file.find("d.i64"), unused), Catch::Contains("I64"));
}
