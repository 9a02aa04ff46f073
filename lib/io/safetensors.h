// safetensors: a little-endian u64 header length, a JSON header {name: {dtype, shape, data_offsets}}, then row-major
// data (evaluation.md 8.6). Everything is checked at opening: header at most 100 MB (the reference's cap), ranges in
// bounds, disjoint, without holes, equal to shape product x item size, no name twice. Errors are kBadData and name
// file, tensor, what was found and what is allowed.
#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "io/mapped_file.h"

namespace vqkv {

struct SafeTensor {
  std::string name;
  std::string dtype;           // as written: "F32", "BF16", "I64", ...
  std::vector<int64_t> shape;  // slowest axis first; empty for a scalar
  int64_t elements = 1;
  uint64_t offset = 0;  // of the first byte in the file
  uint64_t size = 0;    // bytes
};

class SafetensorsFile {
 public:
  explicit SafetensorsFile(const std::string& path);

  const std::string& path() const { return file_.path(); }
  std::span<const uint8_t> bytes() const { return file_.bytes(); }
  const std::vector<SafeTensor>& tensors() const { return tensors_; }  // in the order of their data
  const SafeTensor* find(std::string_view name) const;                 // nullptr when there is none
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  std::span<const uint8_t> tensor_bytes(const SafeTensor& tensor) const;

  // The tensor's values as fp32; F32, F16 and BF16 only, other types are kBadData. `out` has elements() places.
  void read(const SafeTensor& tensor, float* out) const;

 private:
  MappedFile file_;
  std::vector<SafeTensor> tensors_;
  std::map<std::string, size_t, std::less<>> index_;
  std::map<std::string, std::string> metadata_;
};

// The weights of a Hugging Face folder: model.safetensors, or the shards that model.safetensors.index.json lists.
class SafetensorsFolder {
 public:
  explicit SafetensorsFolder(const std::string& folder);

  struct Place {
    const SafetensorsFile* file;
    const SafeTensor* tensor;
  };
  Place find(std::string_view name) const;  // {nullptr, nullptr} when there is none
  const std::vector<std::unique_ptr<SafetensorsFile>>& files() const { return files_; }  // in name order
  std::vector<std::string> names() const;                                                // sorted

 private:
  std::vector<std::unique_ptr<SafetensorsFile>> files_;
  std::map<std::string, Place, std::less<>> index_;
};

}  // namespace vqkv
