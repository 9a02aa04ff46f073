// GGUF v2 and v3: typed key-values, tensor descriptions, and the tensors' bytes in place (evaluation.md 8.4; the format
// is described in ggml's docs/gguf.md). Everything is checked when the file is opened: counts against the bytes that
// are left before anything is allocated, names, types, duplicate keys and tensors, alignment, contiguous offsets.
// Errors are kBadData and name file, key or tensor, byte offset, what was found and what is allowed.
#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "io/ggml_dequant.h"
#include "io/mapped_file.h"

namespace vqkv {

// The numbers are those of the file format.
enum class GgufType : uint32_t {
  kU8 = 0,
  kI8 = 1,
  kU16 = 2,
  kI16 = 3,
  kU32 = 4,
  kI32 = 5,
  kF32 = 6,
  kBool = 7,
  kString = 8,
  kArray = 9,
  kU64 = 10,
  kI64 = 11,
  kF64 = 12,
};

// Where a value stands in the file. For an array: its element type and count; the elements start at `offset`.
struct GgufValue {
  GgufType type = GgufType::kU8;
  GgufType element = GgufType::kU8;
  uint64_t count = 1;
  uint64_t offset = 0;
};

struct GgufTensor {
  std::string name;
  GgmlType type = GgmlType::kF32;
  std::vector<int64_t> shape;  // slowest axis first, as NumPy and PyTorch write it: (out, in) for a weight matrix
  uint64_t offset = 0;         // of the first byte in the file
  uint64_t size = 0;           // bytes, without padding
  int64_t elements() const;
};

class GgufFile {
 public:
  explicit GgufFile(const std::string& path);

  const std::string& path() const { return file_.path(); }
  uint32_t version() const { return version_; }
  uint64_t alignment() const { return alignment_; }
  uint64_t data_offset() const { return data_offset_; }
  std::span<const uint8_t> bytes() const { return file_.bytes(); }

  const std::map<std::string, GgufValue, std::less<>>& values() const { return values_; }
  bool has(std::string_view key) const { return values_.contains(key); }

  // Typed access. A missing key or a value of another type or range is kBadData; the *_or forms take a missing key as
  // `fallback`, never a wrong type. Strings point into the file and live as long as this object.
  std::string_view string(std::string_view key) const;
  std::string_view string_or(std::string_view key, std::string_view fallback) const;
  int64_t integer(std::string_view key, int64_t lowest, int64_t highest) const;  // any integer type
  int64_t integer_or(std::string_view key, int64_t lowest, int64_t highest, int64_t fallback) const;
  double number(std::string_view key) const;  // f32 or f64, finite
  double number_or(std::string_view key, double fallback) const;
  bool boolean_or(std::string_view key, bool fallback) const;
  std::vector<std::string_view> strings(std::string_view key) const;  // array of strings
  std::vector<int64_t> integers(std::string_view key) const;          // array of any integer type
  std::vector<float> floats(std::string_view key) const;              // array of f32

  const std::vector<GgufTensor>& tensors() const { return tensors_; }  // in file order
  const GgufTensor* find_tensor(std::string_view name) const;          // nullptr when there is none
  std::span<const uint8_t> tensor_bytes(const GgufTensor& tensor) const;

 private:
  class Reader;
  const GgufValue* find(std::string_view key) const;
  const GgufValue& require(std::string_view key) const;
  [[noreturn]] void fail_type(std::string_view key, const GgufValue& value, std::string_view wanted) const;
  std::string_view string_at(uint64_t offset) const;
  std::optional<int64_t> integer_at(GgufType type, uint64_t offset) const;
  void read_values(Reader& reader, uint64_t count);
  void read_tensors(Reader& reader, uint64_t count);

  MappedFile file_;
  uint32_t version_ = 0;
  uint64_t alignment_ = 32;
  uint64_t data_offset_ = 0;
  std::map<std::string, GgufValue, std::less<>> values_;
  std::vector<GgufTensor> tensors_;
  std::map<std::string, size_t, std::less<>> tensor_index_;
};

std::string_view gguf_type_name(GgufType type);

}  // namespace vqkv
