// CommVQ's values: what the bits mean, the network that finds them, and its descent.
#include <array>
#include <cmath>
#include <set>

#include "codec/train/binary_code.h"
#include "codec/vq_support.h"
#include "support/catch.h"

using namespace vqkv;
using namespace vqkv::test;

// vq-methods b.3, b.4: four choices of two bits, and (s E / |s E|) * length * channel scale.
TEST_CASE("commvq: values are the rows of their bits, at the length that they had", "[commvq][golden]") {
  constexpr int64_t kWidth = 8;
  const Json knobs = {{"hidden", 2}, {"scale_type", "f32"}, {"stored_as", "f32"}};
  const UnitShape unit = unit_of(kWidth, 1, Role::kValue);
  BinaryCode code = empty_binary_code(kWidth, 4, 2);
  const Matrix<float> e = gaussian(8, kWidth, 15);
  for (int64_t c = 0; c < kWidth; ++c) {
    code.channel_scale[static_cast<size_t>(c)] = 0.5f + static_cast<float>(c);
    for (int64_t r = 0; r < 8; ++r) code.rows(r, c) = e(r, c) * code.channel_scale[static_cast<size_t>(c)];
  }
  // Symbol s chooses s, whatever the row.
  for (size_t s = 0; s < 4; ++s) code.second_bias[4 * s + s] = 1;
  Archive parameters;
  BinaryCode::visit(code, [&](const std::string& name, const std::vector<int64_t>& shape, const float* values) {
    parameters.tensor(name, shape, values);
  });
  const auto codec = checked("commvq", knobs, unit);
  codec->load(parameters);
  const Matrix<float> x = gaussian(3, kWidth, 16);
  CodeBlock block;
  const Matrix<float> y = round_trip(*codec, x, &block);
  CHECK(block.fields[0] == std::vector<uint16_t>(3, 0b00111001));  // (1, 0), (0, 1), (1, 1), (0, 0), lowest bit first
  for (int64_t r = 0; r < 3; ++r) {
    double length = 0, size = 0, sum[kWidth];
    for (int64_t c = 0; c < kWidth; ++c) {
      length += std::pow(double{x(r, c)} / code.channel_scale[static_cast<size_t>(c)], 2);
      sum[c] = double{e(0, c)} + e(3, c) + e(4, c) + e(5, c);
      size += sum[c] * sum[c];
    }
    CHECK(double{block.sides[0][static_cast<size_t>(r)]} == Approx(std::sqrt(length / size)).epsilon(1e-5));
    for (int64_t c = 0; c < kWidth; ++c)
      CHECK(double{y(r, c)} == Approx(sum[c] * std::sqrt(length / size) * code.channel_scale[static_cast<size_t>(c)])
                                   .epsilon(1e-4)
                                   .margin(1e-5));
  }
  code.second_bias.assign(16, 0.0f);  // all alike: the first
  Archive alike;
  BinaryCode::visit(code, [&](const std::string& name, const std::vector<int64_t>& shape, const float* values) {
    alike.tensor(name, shape, values);
  });
  codec->load(alike);
  codec->encode(x, block);
  CHECK(block.fields[0] == std::vector<uint16_t>(3, 0b01010101));
  // No bit, no vector.
  for (size_t s = 0; s < 4; ++s) code.second_bias[4 * s + 3] = 1;
  Archive none;
  BinaryCode::visit(code, [&](const std::string& name, const std::vector<int64_t>& shape, const float* values) {
    none.tensor(name, shape, values);
  });
  codec->load(none);
  for (const float v : round_trip(*codec, x).storage) CHECK(std::abs(v) < 1e-30f);
}

TEST_CASE("commvq: the network sees rows of any length alike, through the layers as written", "[commvq][golden]") {
  BinaryCode code = empty_binary_code(4, 2, 3);
  Rng rng(17);
  const auto draw = [&](auto& values) {
    for (float& v : values) v = static_cast<float>(rng.normal());
  };
  draw(code.first.storage);
  draw(code.first_bias);
  draw(code.second.storage);
  draw(code.second_bias);
  draw(code.rows.storage);
  const Matrix<float> x = gaussian(50, 4, 18);
  Matrix<float> longer = x;
  for (float& v : longer.storage) v *= 1024;
  const BinaryEncoder encoder(code);
  std::vector<uint16_t> bits(50), same(50);
  std::vector<float> scale(50), times(50);
  encoder.encode_rows(x, bits.data(), 1, scale.data());
  encoder.encode_rows(longer, same.data(), 1, times.data());
  CHECK(bits == same);
  std::set<uint16_t> seen(bits.begin(), bits.end());
  CHECK(seen.size() >= 4);
  for (size_t r = 0; r < 50; ++r) {
    CHECK(times[r] == 1024 * scale[r]);
    // Length, LayerNorm, layer, GELU, layer, the largest of four.
    double length = 0, mean = 0, variance = 0, z[4], h[3];
    const float* row = x.row(static_cast<int64_t>(r));
    for (int c = 0; c < 4; ++c) length += double{row[c]} * row[c];
    length = std::sqrt(length);
    for (int c = 0; c < 4; ++c) mean += row[c] / length / 4;
    for (int c = 0; c < 4; ++c) variance += std::pow(row[c] / length - mean, 2) / 4;
    for (int c = 0; c < 4; ++c) z[c] = (row[c] / length - mean) / std::sqrt(variance + 1e-5);
    for (int i = 0; i < 3; ++i) {
      double v = code.first_bias[static_cast<size_t>(i)];
      for (int c = 0; c < 4; ++c) v += z[c] * code.first(i, c);
      h[i] = v * 0.5 * std::erfc(-v / std::sqrt(2.0));
    }
    for (int s = 0; s < 2; ++s) {
      int chosen = 0;
      double most = -1e30;
      for (int k = 0; k < 4; ++k) {
        double v = code.second_bias[static_cast<size_t>(4 * s + k)];
        for (int i = 0; i < 3; ++i) v += h[i] * code.second(4 * s + k, i);
        if (v > most) {
          most = v;
          chosen = k;
        }
      }
      const int expected[] = {0b01, 0b10, 0b11, 0b00};
      CHECK((bits[r] >> 2 * s & 3) == expected[chosen]);
    }
  }
}

TEST_CASE("commvq: values at their published rate, matrix and network in the account", "[commvq][golden]") {
  const auto eight = unit_of(128, 8, Role::kValue);
  CHECK(checked("commvq", Json::object(), eight)->layout().bits_per_token() / 1024 == 1 + 16 / 1024.0);
  CHECK(checked("commvq", {{"value_bits", 2}}, eight)->layout().bits_per_token() / 1024 == 2 + 16 / 1024.0);
  const auto codec = trained("commvq", {{"value_steps", 2}}, unit_of(16, 2, Role::kValue), gaussian(300, 32, 19));
  // Matrix (32, 32), layers (64, 32) and (64, 64) with their biases at 2 bytes; channel scales and half the matrix'
  // sum.
  CHECK(codec->constant_bytes() == 2 * (32 * 32 + 64 * 33 + 64 * 65) + 2 * 4 * 32);
}

TEST_CASE("commvq: descent on values lowers their error, and a second bit a value lowers it more", "[commvq]") {
  const UnitShape unit = unit_of(16, 1, Role::kValue);
  const auto x = gaussian(4000, 16, 20), test = gaussian(1000, 16, 21);
  Json knobs = {{"value_steps", 1}, {"value_batch", 256}, {"learning_rate", 0.01}};
  const double start = round_trip_mse(*trained("commvq", knobs, unit, x), test);
  knobs["value_steps"] = 300;
  const double one = round_trip_mse(*trained("commvq", knobs, unit, x), test);
  knobs["value_bits"] = 2;
  const double two = round_trip_mse(*trained("commvq", knobs, unit, x), test);
  INFO("start " << start << ", one bit " << one << ", two bits " << two);
  CHECK(one < 0.6);
  CHECK(start > 1.2 * one);
  CHECK(two < 0.7 * one);
}

TEST_CASE("commvq: the loss of outputs moves values' error to tokens that nobody looks at", "[commvq]") {
  const UnitShape unit = unit_of(16, 1, Role::kValue);
  const auto x = gaussian(2000, 16, 22);
  std::vector<float> mass2(2000, 1e-4f);
  for (size_t r = 0; r < 2000; r += 2) mass2[r] = 1.0f;
  // Those that are looked at lie along one half of the channels, the others along the other.
  Matrix<float> rows = x;
  for (int64_t r = 0; r < 2000; ++r)
    for (int64_t c = 0; c < 16; ++c) rows(r, c) *= (c < 8) == (r % 2 == 0) ? 1.0f : 0.1f;
  const auto errors = [&](double output_loss) {
    TrainSet set = train_set(rows, unit);
    set.received_mass2 = mass2;
    const auto codec = checked(
        "commvq", {{"value_steps", 400}, {"value_batch", 256}, {"learning_rate", 0.01}, {"output_loss", output_loss}},
        unit);
    codec->train(set, Rng(5));
    CodeBlock block;
    codec->encode(rows, block, nullptr);
    Matrix<float> y(2000, 16);
    codec->decode(block, y);
    std::array<double, 2> error = {0, 0};
    for (int64_t r = 0; r < 2000; ++r)
      for (int64_t c = 0; c < 16; ++c) error[static_cast<size_t>(r % 2)] += std::pow(rows(r, c) - y(r, c), 2);
    return error;
  };
  const auto alone = errors(0), beside = errors(20);
  INFO("alone " << alone[0] << " " << alone[1] << ", beside " << beside[0] << " " << beside[1]);
  CHECK(beside[0] < 0.95 * alone[0]);
  CHECK(beside[1] > alone[1]);
  CHECK(find_method("commvq").needs({{"output_loss", 2}}).mass);
  CHECK_FALSE(find_method("commvq").needs(Json::object()).mass);
  TrainSet without = train_set(rows, unit);
  CHECK_THROWS_AS(checked("commvq", {{"output_loss", 1}}, unit)->train(without, Rng(5)), Error);
}
