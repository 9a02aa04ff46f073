// Parameters of a codec in memory: what an archive does, without a file.
#pragma once
#include <map>

#include "codec/codec.h"
#include "core/error.h"

namespace vqkv::test {

class MemoryParameters final : public ParameterWriter, public ParameterReader {
 public:
  struct Tensor {
    std::vector<int64_t> shape;
    std::vector<float> data;
    bool operator==(const Tensor&) const = default;
  };

  void tensor(const std::string& name, const std::vector<int64_t>& shape, const float* data) override {
    size_t size = 1;
    for (const int64_t s : shape) size *= static_cast<size_t>(s);
    VQKV_CHECK(tensors.emplace(name, Tensor{shape, {data, data + size}}).second);
  }
  void facts(const std::string& name, const Json& value) override { VQKV_CHECK(values.emplace(name, value).second); }

  AlignedVector<float> tensor(const std::string& name, const std::vector<int64_t>& wanted) const override {
    const auto it = tensors.find(name);
    if (it == tensors.end()) fail_data("no tensor '" + name + "'");
    bool fits = it->second.shape.size() == wanted.size();
    for (size_t i = 0; fits && i < wanted.size(); ++i) fits = wanted[i] == -1 || wanted[i] == it->second.shape[i];
    if (!fits) fail_data("tensor '" + name + "' has another shape");
    return {it->second.data.begin(), it->second.data.end()};
  }
  std::vector<int64_t> shape(const std::string& name) const override {
    const auto it = tensors.find(name);
    if (it == tensors.end()) fail_data("no tensor '" + name + "'");
    return it->second.shape;
  }
  Json facts(const std::string& name) const override {
    const auto it = values.find(name);
    if (it == values.end()) fail_data("no facts '" + name + "'");
    return it->second;
  }
  bool operator==(const MemoryParameters& o) const { return tensors == o.tensors && values == o.values; }

  std::map<std::string, Tensor> tensors;
  std::map<std::string, Json> values;
};

}  // namespace vqkv::test
