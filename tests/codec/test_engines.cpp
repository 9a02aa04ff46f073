// The caches that inference engines keep: ggml's blocks, 8-bit floats, QuaRot's grid. Bytes of other quantizers:
// tests/golden/make_engine_goldens.py.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "codec/build.h"
#include "codec/vq_support.h"
#include "core/error.h"
#include "core/json.h"
#include "io/atomic_file.h"
#include "io/ggml_dequant.h"
#include "support/cache_shape.h"
#include "support/catch.h"
#include "support/memory_parameters.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

const Json& goldens() {
  static const Json all = [] {
    const std::string path = VQKV_SOURCE_DIR "/tests/golden/data/engine_codes.json";
    return parse_json(read_file(path), path);
  }();
  return all;
}

std::unique_ptr<Codec> ggml(const std::string& type, int channels = 32) {
  return find_method("ggml").make({{"type", type}}, unit_of(channels));
}

struct GgmlCase {
  const char* name;
  GgmlType type;
  int bits;  // of a code
  bool minimum;
  double bits_a_value;
};
constexpr GgmlCase kGgml[] = {{"q8_0", GgmlType::kQ8_0, 8, false, 8.5}, {"q5_1", GgmlType::kQ5_1, 5, true, 6},
                              {"q5_0", GgmlType::kQ5_0, 5, false, 5.5}, {"q4_1", GgmlType::kQ4_1, 4, true, 5},
                              {"q4_0", GgmlType::kQ4_0, 4, false, 4.5}, {"iq4_nl", GgmlType::kIQ4_NL, 4, false, 4.5}};

// Block b as ggml lays it out: scale, minimum, fifth bits, then bytes, or value i in the low and value i + 16 in the
// high half of byte i.
std::vector<uint8_t> block_bytes(const GgmlCase& c, const CodeBlock& codes, size_t b) {
  std::vector<uint8_t> out;
  const auto half = [&](float v) {
    const uint16_t bits = to_f16(v).bits;
    out.push_back(static_cast<uint8_t>(bits & 0xff));
    out.push_back(static_cast<uint8_t>(bits >> 8));
  };
  half(codes.sides[0][b]);
  if (c.minimum) half(codes.sides[1][b]);
  const uint16_t* code = codes.fields[0].data() + 32 * b;
  if (c.bits == 8)
    for (int i = 0; i < 32; ++i) out.push_back(static_cast<uint8_t>(code[i] - 128));
  if (c.bits == 5)
    for (int byte = 0; byte < 4; ++byte) {
      int fifth = 0;
      for (int i = 0; i < 8; ++i) fifth |= (code[8 * byte + i] >> 4) << i;
      out.push_back(static_cast<uint8_t>(fifth));
    }
  if (c.bits < 8)
    for (int i = 0; i < 16; ++i) out.push_back(static_cast<uint8_t>((code[i] & 15) | (code[i + 16] & 15) << 4));
  return out;
}

std::vector<uint8_t> from_hex(const std::string& text) {
  std::vector<uint8_t> out;
  for (size_t i = 0; i < text.size(); i += 2)
    out.push_back(static_cast<uint8_t>(std::stoi(text.substr(i, 2), nullptr, 16)));
  return out;
}

Matrix<float> golden_rows() {
  const Json& rows = goldens()["x"];
  Matrix<float> x(static_cast<int64_t>(rows.size()), 32);
  for (size_t r = 0; r < rows.size(); ++r)
    for (size_t c = 0; c < 32; ++c) x(static_cast<int64_t>(r), static_cast<int64_t>(c)) = rows[r][c].get<float>();
  return x;
}

}  // namespace

TEST_CASE("ggml's blocks are llama.cpp's, byte for byte, and decode to its bits", "[ggml][golden]") {
  const Matrix<float> x = golden_rows();
  for (const GgmlCase& c : kGgml) {
    CodeBlock codes;
    const Matrix<float> y = round_trip(*ggml(c.name), x, &codes);
    const Json& blocks = goldens()["ggml"][c.name];
    REQUIRE(blocks.size() == static_cast<size_t>(x.rows));
    for (size_t b = 0; b < blocks.size(); ++b) {
      CAPTURE(c.name, b);
      const std::vector<uint8_t> bytes = from_hex(blocks[b].get<std::string>());
      CHECK(block_bytes(c, codes, b) == bytes);
      CHECK(static_cast<double>(bytes.size()) * 8 / 32 == c.bits_a_value);
      float expected[32];
      ggml_dequantize(c.type, bytes.data(), expected, 32);
      CHECK(std::equal(expected, expected + 32, y.row(static_cast<int64_t>(b))));
    }
  }
}

TEST_CASE("ggml's blocks lie side by side along the channels of a token", "[ggml]") {
  const Matrix<float> x = gaussian(9, 128, 11);
  for (const GgmlCase& c : kGgml) {
    CodeBlock wide, narrow;
    round_trip(*ggml(c.name, 128), x, &wide);
    round_trip(*ggml(c.name), {x.data(), 36, 32}, &narrow);
    CHECK(wide.fields == narrow.fields);
    CHECK(wide.sides == narrow.sides);
  }
}

// baseline-methods 17b
TEST_CASE("ggml's worked example: q4_0 keeps the loudest value", "[ggml][golden]") {
  Matrix<float> x(1, 32);
  const float values[] = {.5f, -2, 1.9f, .13f};
  std::copy_n(values, 4, x.data());
  CodeBlock codes;
  const Matrix<float> y = round_trip(*ggml("q4_0"), x, &codes);
  CHECK(codes.sides[0] == std::vector<float>{.25f});
  CHECK(std::vector<uint16_t>(codes.fields[0].begin(), codes.fields[0].begin() + 5) ==
        std::vector<uint16_t>{10, 0, 15, 9, 8});
  CHECK(std::vector<float>(y.data(), y.data() + 5) == std::vector<float>{.5f, -2, 1.75f, .25f, 0});
}

// baseline-methods 1.3
TEST_CASE("mean squared error of ggml's blocks on Gaussian data", "[ggml][golden]") {
  const Matrix<float> x = gaussian(20000, 128, 11);
  const auto mse = [&](const char* type) { return relative_error(round_trip(*ggml(type, 128), x), x); };
  CHECK(mse("q4_0") == Approx(.00737).epsilon(.03));
  CHECK(mse("q4_1") == Approx(.00608).epsilon(.03));
  CHECK(mse("q8_0") == Approx(2.9e-5).epsilon(.05));
  CHECK(mse("iq4_nl") < mse("q4_0"));
}

TEST_CASE("ggml's blocks of nothing, of next to nothing and of too much", "[ggml]") {
  for (const GgmlCase& c : kGgml)
    for (const float v : {0.0f, -0.0f, 1e-40f, 1e-16f, 1e-8f, 6e4f, 1e6f, 1e25f, 3e38f}) {
      CAPTURE(c.name, v);
      Matrix<float> x(1, 32, v);
      for (int64_t i = 0; i < 32; i += 3) x(0, i) = -v;
      CodeBlock codes;
      const Matrix<float> y = round_trip(*ggml(c.name), x, &codes);
      for (const uint16_t code : codes.fields[0]) REQUIRE(code < (1 << c.bits));
      for (const float d : y.storage) {
        REQUIRE(std::isfinite(d));
        if (std::abs(v) < 1e-15f) REQUIRE(d == 0);
      }
    }
}

TEST_CASE("ggml's rotated caches: keys by the largest power of two of a head, values in blocks of 64", "[ggml]") {
  for (const int head_dim : {64, 128, 192}) {
    const CodecPlan plan = resolve_codec({{"name", "ggml"}, {"preset", "rot-q4_0"}}, make_shape(1, 3, 1, head_dim));
    CHECK(plan.skip == "");
    for (const UnitSpec& spec : plan.units) {
      const auto codec = make_codec(spec);
      const DecodePlan decode = codec->plan();
      CHECK(std::get<HadamardMap>(decode.map).block == (spec.unit.role == Role::kValue ? 64
                                                        : head_dim == 128              ? 128
                                                                                       : 64));
      Matrix<float> x = gaussian(64, head_dim, 11);  // one loud channel
      for (int64_t t = 0; t < x.rows; ++t) x(t, 5) = 30;
      CHECK(relative_error(round_trip(*codec, x), x) < relative_error(round_trip(*ggml("q4_0", head_dim), x), x));
    }
  }
  // llama.cpp does not rotate there.
  CHECK(resolve_codec({{"name", "ggml"}, {"preset", "rot-q4_0"}}, make_shape(1, 3, 1, 96)).skip != "");
  CHECK_THAT(find_method("ggml").check({{"type", "q4_0"}}, unit_of(80)), Catch::Contains("80"));
}

TEST_CASE("8-bit floats are the bytes that another library makes", "[fp8][golden]") {
  const auto values = goldens()["fp8_x"].get<std::vector<float>>();
  const auto n = static_cast<int>(values.size());
  for (const char* format : {"e4m3", "e5m2"}) {
    CAPTURE(format);
    const auto codec = find_method("fp8").make({{"format", format}}, unit_of(n));
    CodeBlock codes;
    round_trip(*codec, {values.data(), 1, n}, &codes);
    CHECK(codes.fields[0] == goldens()[format].get<std::vector<uint16_t>>());
    CHECK(codec->layout().bits_per_token() == 8.0 * n);
    CHECK(is_identity(codec->plan().map));
  }
}

TEST_CASE("the scale of an 8-bit float puts the loudest value of a tensor or head at the end of the range", "[fp8]") {
  Matrix<float> x = gaussian(40, 64, 11);  // two heads, one loud
  for (int64_t t = 0; t < x.rows; ++t)
    for (int64_t c = 32; c < 64; ++c) x(t, c) *= 100;
  const auto loudest = [&](int64_t first) {
    float most = 0;
    for (int64_t t = 0; t < x.rows; ++t)
      for (int64_t c = first; c < first + 32; ++c) most = std::max(most, std::abs(x(t, c)));
    return most;
  };
  const TrainSet set = train_set(x, unit_of(32, 2));
  for (const char* scale : {"tensor", "head"})
    for (const double range : {0.0, 200.0}) {
      CAPTURE(scale, range);
      const Json knobs = {{"scale", scale}, {"range", range}};
      CHECK(find_method("fp8").needs(knobs).rows);
      const auto codec = find_method("fp8").make(knobs, unit_of(32, 2));
      codec->train(set, Rng(1));
      const DecodePlan plan = codec->plan();
      const auto& factor = std::get<DiagonalMap>(plan.map).factor;
      const double end = range > 0 ? range : 448;
      CHECK(factor[63] == static_cast<float>(loudest(32) / end));
      CHECK(factor[0] == static_cast<float>(loudest(std::string(scale) == "head" ? 0 : 32) / end));
      const Matrix<float> y = round_trip(*codec, x);
      CHECK(relative_error(y, x) < 1.0 / 256);  // half a unit of the 4th bit
      CHECK(codec->constant_bytes() == (std::string(scale) == "head" ? 8 : 4));
      MemoryParameters saved;
      codec->save(saved);
      const auto loaded = find_method("fp8").make(knobs, unit_of(32, 2));
      loaded->load(saved);
      CHECK(round_trip(*loaded, x).storage == y.storage);
    }
  CHECK_FALSE(find_method("fp8").needs({{"scale", "one"}}).rows);
  CHECK_THAT(find_method("fp8").check({{"range", 449}}, unit_of(64)), Catch::Contains("448"));
  CHECK(find_method("fp8").check({{"range", 449}, {"format", "e5m2"}}, unit_of(64)) == "");
}

TEST_CASE("the levels of a format are nobody's books", "[fp8][ggml]") {
  CHECK(find_method("fp8").make(Json::object(), unit_of(64))->constant_bytes() == 0);
  for (const GgmlCase& c : kGgml) CHECK(ggml(c.name)->constant_bytes() == 0);
}

// The published code's formulas, in double: spcl/QuaRot, fake_quant/quant_utils.py.
TEST_CASE("QuaRot's cache is its formulas behind a Hadamard rotation", "[rtn][golden]") {
  for (const char* preset : {"quarot", "quarot_symmetric"})
    for (const UnitSpec& spec : resolve_codec({{"name", "rtn"}, {"preset", preset}}, make_shape(1, 3, 1, 64)).units) {
      const auto codec = make_codec(spec);
      Matrix<float> x = gaussian(50, 64, 11);
      for (int64_t t = 25; t < 50; ++t)
        for (int64_t c = 0; c < 64; ++c) x(t, c) += c == 0 ? 40 : 0;  // rotated: a range that doesn't hold 0
      CodeBlock codes;
      round_trip(*codec, x, &codes);
      const bool symmetric = std::string(preset) == "quarot_symmetric";
      const bool key = spec.unit.role == Role::kKey;
      for (int64_t t = 0; t < x.rows; ++t) {
        double rotated[64], low = key ? 0 : 1e9, high = key ? 0 : -1e9;
        for (int i = 0; i < 64; ++i) {
          rotated[i] = 0;
          for (int j = 0; j < 64; ++j)
            rotated[i] += (std::popcount(static_cast<unsigned>(i & j)) % 2 ? -1 : 1) * double{x(t, j)} / 8;
          low = std::min(low, rotated[i]);
          high = std::max(high, rotated[i]);
        }
        low *= .95, high *= .95;
        // Codes follow from the scale as stored, in float16.
        const double scale = codes.sides[0][static_cast<size_t>(t)];
        CHECK(scale == Approx(symmetric ? std::max(-low, high) / 7 : (high - low) / 15).epsilon(1e-3));
        const double zero = symmetric ? 8 : std::nearbyint(-low / scale);
        for (int i = 0; i < 64; ++i) {
          const double ratio = rotated[i] / scale;
          CAPTURE(preset, t, i, ratio);
          if (std::abs(ratio - std::floor(ratio) - .5) < 1e-4) continue;  // the codec rotates in float
          CHECK(codes.fields[0][static_cast<size_t>(t * 64 + i)] ==
                std::clamp(std::nearbyint(ratio) + zero, 0.0, 15.0));
        }
      }
    }
}
