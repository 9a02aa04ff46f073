#include "core/dtype.h"

#include <bit>
#include <cmath>
#include <vector>

#include "support/catch.h"
#include "support/nearest_even.h"

using namespace vqkv;
using vqkv::test::nearest_even_bf16;

TEST_CASE("every half survives the round trip through float, scalar and bulk") {
  std::vector<f16> all(65536), back(65536);
  std::vector<float> wide(65536);
  for (uint32_t i = 0; i < 65536; ++i) all[i].bits = static_cast<uint16_t>(i);
  to_float(all.data(), wide.data(), 65536);
  to_f16(wide.data(), back.data(), 65536);
  for (uint32_t i = 0; i < 65536; ++i) {
    const float scalar = to_float(all[i]);
    if (std::isnan(scalar)) {
      REQUIRE(std::isnan(wide[i]));
      REQUIRE(std::isnan(to_float(back[i])));
      continue;
    }
    REQUIRE(scalar == wide[i]);
    REQUIRE(to_f16(scalar).bits == i);
    REQUIRE(back[i].bits == i);
  }
}

TEST_CASE("rows of halves widen to rows apart from each other, whatever their length") {
  const auto check = [](auto of_type) {
    using T = decltype(of_type);
    std::vector<T> in(5 * 41);
    for (size_t i = 0; i < in.size(); ++i) in[i].bits = static_cast<uint16_t>(0x3000 + 7 * i);
    for (const int64_t n : {0, 1, 7, 8, 19, 40}) {
      std::vector<float> out(5 * 43, -1);
      to_float(in.data(), 41, out.data(), 43, 5, n);
      for (int64_t r = 0; r < 5; ++r)
        for (int64_t i = 0; i < 43; ++i)
          REQUIRE(out[static_cast<size_t>(r * 43 + i)] == (i < n ? to_float(in[static_cast<size_t>(r * 41 + i)]) : -1));
    }
  };
  check(f16());
  check(bf16());
}

TEST_CASE("rounding to half and bfloat is to nearest even") {
  CHECK(to_f16(1.0f + 0x1p-11f).bits == to_f16(1.0f).bits);  // tie goes to even
  CHECK(to_f16(1.0f + 3 * 0x1p-11f).bits == to_f16(1.0f).bits + 2);
  CHECK(to_f16(65519.0f).bits == 0x7bff);
  CHECK(to_f16(65520.0f).bits == 0x7c00);
  CHECK(to_f16(0x1p-25f).bits == 0);
  CHECK(to_f16(0x1.8p-25f).bits == 1);
  CHECK(to_bf16(1.0f + 0x1p-8f).bits == 0x3f80);
  CHECK(to_bf16(1.0f + 3 * 0x1p-8f).bits == 0x3f82);
  CHECK(std::isnan(to_float(to_bf16(std::nanf("")))));
  for (uint32_t i = 0; i < 65536; ++i) {
    const bf16 b{static_cast<uint16_t>(i)};
    if (!std::isnan(to_float(b))) REQUIRE(to_bf16(to_float(b)).bits == i);
  }
}

TEST_CASE("every half becomes the nearest bfloat, ties to even, scalar and bulk") {
  std::vector<float> wide(65536);
  std::vector<bf16> bulk(65536);
  for (uint32_t i = 0; i < 65536; ++i) wide[i] = to_float(f16{static_cast<uint16_t>(i)});
  to_bf16(wide.data(), bulk.data(), 65536);
  for (uint32_t i = 0; i < 65536; ++i) {
    const bf16 one = to_bf16(wide[i]);
    if (std::isnan(wide[i])) {
      REQUIRE(std::isnan(to_float(one)));
      REQUIRE(std::isnan(to_float(bulk[i])));
      continue;
    }
    REQUIRE(bulk[i].bits == one.bits);
    REQUIRE(one.bits == nearest_even_bf16(wide[i]));
  }
}

TEST_CASE("rounding to f8e5m2 is to nearest even and fills the upper byte of a half") {
  // The fourth is above a tie by less than a half can tell.
  float v[] = {1.0f,     1.125f,   1.126f,   0x1.200002p0f, 1.375f,     -3.3f,
               57344.0f, 61440.0f, 0x1p-16f, 0x1p-17f,      0x1.8p-17f, 0.0f};
  const float expected[] = {1.0f, 1.0f, 1.25f, 1.25f, 1.5f, -3.5f, 57344.0f, HUGE_VALF, 0x1p-16f, 0.0f, 0x1p-16f, 0.0f};
  round_to(DType::kF8E5M2, v, 12);
  for (int i = 0; i < 12; ++i) {
    CHECK(v[i] == expected[i]);
    CHECK((to_f16(v[i]).bits & 0xff) == 0);
  }
}

TEST_CASE("8-bit floats: every byte comes back, and every number goes to the nearest byte, ties to the even one") {
  const auto check = [](auto narrow, auto widen, int finite, float beyond) {
    for (int code = 0; code < 128; ++code) {
      const float v = widen(static_cast<uint8_t>(code));
      CHECK(std::signbit(widen(static_cast<uint8_t>(code | 0x80))));
      if (std::isnan(v)) continue;
      CHECK(narrow(v) == code);
      CHECK(narrow(-v) == (code | 0x80));
      if (code + 1 >= finite) continue;
      const float next = widen(static_cast<uint8_t>(code + 1)), middle = v + (next - v) / 2;
      REQUIRE(v < next);
      CHECK(narrow(middle) == code + code % 2);
      CHECK(narrow(std::nextafter(middle, v)) == code);
      CHECK(narrow(std::nextafter(middle, next)) == code + 1);
    }
    CHECK(narrow(std::nextafter(beyond, 0.0f)) == finite - 1);
    CHECK(narrow(beyond) == finite);
    CHECK(narrow(HUGE_VALF) == finite);
    CHECK(std::isnan(widen(narrow(std::nanf("")))));
  };
  check([](float v) { return to_f8e4m3(v).bits; }, [](uint8_t b) { return to_float(f8e4m3{b}); }, 0x7f,
        std::nextafter(0x1.dp8f, 1e9f));  // 464 itself is a tie, and 448 has the even byte
  check([](float v) { return to_f8e5m2(v).bits; }, [](uint8_t b) { return to_float(f8e5m2{b}); }, 0x7c, 0x1.ep15f);
  CHECK(to_float(f8e4m3{0x7e}) == 448.0f);
  CHECK(to_float(f8e4m3{0x01}) == 0x1p-9f);
  CHECK(to_float(f8e5m2{0x7b}) == 57344.0f);
}

TEST_CASE("rounding a whole array equals rounding each value") {
  std::vector<float> values;
  for (uint32_t i = 0; i < 3000; ++i) values.push_back(std::bit_cast<float>(i * 1431655u));
  for (const DType type : {DType::kF16, DType::kBF16}) {
    std::vector<float> rounded = values;
    round_to(type, rounded.data(), static_cast<int64_t>(rounded.size()));
    for (size_t i = 0; i < values.size(); ++i) {
      const float one = type == DType::kF16 ? round_to_f16(values[i]) : round_to_bf16(values[i]);
      CHECK((std::isnan(one) ? std::isnan(rounded[i]) : rounded[i] == one));
    }
  }
}
