// What the tests of trained codecs share.
#pragma once
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "codec/codec.h"
#include "core/rng.h"
#include "support/codec_rows.h"

namespace vqkv::test {

inline TrainSet train_set(ConstMatrix x, const UnitShape& unit) {
  TrainSet set;
  set.x = x;
  set.head_dim = unit.head_dim;
  set.heads = unit.heads;
  return set;
}

// Untrained, of knobs that the method takes for the unit.
inline std::unique_ptr<Codec> checked(const std::string& method, const Json& knobs, const UnitShape& unit) {
  if (const std::string why = find_method(method).check(knobs, unit); !why.empty()) fail_usage(why);
  return find_method(method).make(knobs, unit);
}

inline std::unique_ptr<Codec> trained(const std::string& method, const Json& knobs, const UnitShape& unit,
                                      ConstMatrix x, uint64_t key = 1) {
  auto codec = find_method(method).make(knobs, unit);
  codec->train(train_set(x, unit), Rng(key));
  return codec;
}

// Mean squared error a value after a round trip.
inline double round_trip_mse(const Codec& codec, ConstMatrix x, int level = -1) {
  CodeBlock block;
  codec.encode(x, block);
  Matrix<float> y(x.rows, x.cols);
  codec.decode(block, y, {level, nullptr});
  double sum = 0;
  for (int64_t r = 0; r < x.rows; ++r)
    for (int64_t c = 0; c < x.cols; ++c) sum += (double{x(r, c)} - y(r, c)) * (double{x(r, c)} - y(r, c));
  return sum / static_cast<double>(x.rows * x.cols);
}

// Parameters in memory.
class Archive final : public ParameterWriter, public ParameterReader {
 public:
  void tensor(const std::string& name, const std::vector<int64_t>& shape_in, const float* data) override {
    size_t n = 1;
    for (const int64_t s : shape_in) n *= static_cast<size_t>(s);
    tensors[name] = {shape_in, AlignedVector<float>(data, data + n)};
  }
  void facts(const std::string& name, const Json& value) override { json[name] = value; }
  AlignedVector<float> tensor(const std::string& name, const std::vector<int64_t>& expected) const override {
    const auto at = tensors.find(name);
    if (at == tensors.end() || at->second.first != expected) fail_data(name + ": absent or of another shape");
    return at->second.second;
  }
  std::vector<int64_t> shape(const std::string& name) const override { return tensors.at(name).first; }
  Json facts(const std::string& name) const override {
    const auto at = json.find(name);
    if (at == json.end()) fail_data(name + ": absent");
    return at->second;
  }
  std::map<std::string, std::pair<std::vector<int64_t>, AlignedVector<float>>> tensors;
  std::map<std::string, Json> json;
};

}  // namespace vqkv::test
