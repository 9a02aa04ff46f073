#include "io/gguf.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "core/error.h"

namespace vqkv {
namespace {

constexpr uint64_t kMaxKeyBytes = 65535;      // the format's own limit
constexpr uint64_t kMaxTensorNameBytes = 63;  // the reference reader's buffer is 64 with the final zero
constexpr uint32_t kMaxDimensions = 4;
constexpr uint64_t kMaxAlignment = 1u << 20;         // a page at most in practice; keeps padded sizes far from overflow
constexpr uint64_t kMinValueBytes = 8 + 4 + 1;       // an empty key, a type, one byte
constexpr uint64_t kMinTensorBytes = 8 + 4 + 4 + 8;  // an empty name, no axis, a type, an offset
constexpr uint32_t kLastType = static_cast<uint32_t>(GgufType::kF64);

constexpr std::string_view kTypeNames[] = {"u8",   "i8",     "u16",   "i16", "u32", "i32", "f32",
                                           "bool", "string", "array", "u64", "i64", "f64"};
// Bytes of a scalar; 0 for what has no fixed size.
constexpr uint64_t kTypeBytes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};

uint64_t bytes_of(GgufType type) { return kTypeBytes[static_cast<uint32_t>(type)]; }

// File content in a message: short and printable.
std::string printable(std::string_view text) {
  std::string out;
  for (const char c : text.substr(0, 80)) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte >= 0x20 && byte < 0x7f)
      out += c;
    else
      out += fmt::format("\\x{:02x}", byte);
  }
  return text.size() > 80 ? out + "..." : out;
}

template <class T>
T load(const uint8_t* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

}  // namespace

std::string_view gguf_type_name(GgufType type) { return kTypeNames[static_cast<uint32_t>(type)]; }

int64_t GgufTensor::elements() const {
  int64_t n = 1;
  for (const int64_t axis : shape) n *= axis;  // the product was checked when the file was opened
  return n;
}

// A cursor that never leaves the file. `place` names what is being read.
class GgufFile::Reader {
 public:
  explicit Reader(const MappedFile& file) : file_(file) {}
  uint64_t offset() const { return offset_; }
  uint64_t left() const { return file_.size() - offset_; }

  [[noreturn]] void fail(const std::string& place, const std::string& problem) const {
    fail_at(place, offset_, problem);
  }
  [[noreturn]] void fail_at(const std::string& place, uint64_t offset, const std::string& problem) const {
    fail_data(fmt::format("{}: {} (byte {}): {}", file_.path(), place, offset, problem));
  }

  void need(uint64_t bytes, const std::string& place) const {
    if (bytes > left())
      fail(place,
           fmt::format("{} bytes are needed, the file ends after {} more (it has {})", bytes, left(), file_.size()));
  }
  template <class T>
  T scalar(const std::string& place) {
    need(sizeof(T), place);
    const T value = load<T>(file_.data() + offset_);
    offset_ += sizeof(T);
    return value;
  }
  std::string_view text(const std::string& place, uint64_t max_bytes) {
    const uint64_t start = offset_;
    const auto length = scalar<uint64_t>(place);
    if (length > max_bytes)
      fail_at(place, start, fmt::format("a length of {} bytes, at most {} are allowed", length, max_bytes));
    need(length, place);
    const std::string_view view(reinterpret_cast<const char*>(file_.data() + offset_), length);
    offset_ += length;
    return view;
  }
  // count items of at least `item_bytes` each must fit in what is left: nothing is allocated before this holds.
  void need_items(uint64_t count, uint64_t item_bytes, const std::string& place, uint64_t where) const {
    if (count > left() / item_bytes)
      fail_at(place, where,
              fmt::format("a count of {}, at most {} fit in the {} bytes left", count, left() / item_bytes, left()));
  }
  void skip(uint64_t bytes, const std::string& place) {
    need(bytes, place);
    offset_ += bytes;
  }

 private:
  const MappedFile& file_;
  uint64_t offset_ = 0;
};

GgufFile::GgufFile(const std::string& path) : file_(path) {
  Reader reader(file_);
  reader.need(4, "magic");
  if (std::memcmp(file_.data(), "GGUF", 4) != 0)
    reader.fail("magic", fmt::format("\"{}\" found, \"GGUF\" expected: not a GGUF file",
                                     printable({reinterpret_cast<const char*>(file_.data()), 4})));
  reader.skip(4, "magic");
  version_ = reader.scalar<uint32_t>("version");
  if (version_ != 2 && version_ != 3) {
    const bool swapped = version_ == 0x02000000u || version_ == 0x03000000u;
    reader.fail_at("version", 4,
                   swapped ? std::string("a big-endian file; only little-endian ones are read")
                           : fmt::format("{} found, 2 and 3 are read", version_));
  }
  const auto tensor_count = reader.scalar<uint64_t>("tensor count");
  const auto value_count = reader.scalar<uint64_t>("key-value count");
  reader.need_items(tensor_count, kMinTensorBytes, "tensor count", 8);
  reader.need_items(value_count, kMinValueBytes, "key-value count", 16);
  read_values(reader, value_count);
  if (has("general.alignment")) {
    const GgufValue& value = require("general.alignment");
    if (value.type != GgufType::kU32) fail_type("general.alignment", value, "u32");
    alignment_ = load<uint32_t>(file_.data() + value.offset);
    if (!std::has_single_bit(alignment_) || alignment_ > kMaxAlignment)
      reader.fail_at("general.alignment", value.offset,
                     fmt::format("{} found, a power of two up to {} is allowed", alignment_, kMaxAlignment));
  }
  read_tensors(reader, tensor_count);
}

void GgufFile::read_values(Reader& reader, uint64_t count) {
  for (uint64_t i = 0; i < count; ++i) {
    const std::string place = fmt::format("key {} of {}", i + 1, count);
    const uint64_t start = reader.offset();
    const std::string_view name = reader.text(place, kMaxKeyBytes);
    if (name.empty()) reader.fail_at(place, start, "an empty name");
    if (name.find('\0') != std::string_view::npos)
      reader.fail_at(place, start, fmt::format("a zero byte in the name \"{}\"", printable(name)));
    const std::string key = fmt::format("key \"{}\"", printable(name));
    const auto read_type = [&] {
      const uint64_t where = reader.offset();
      const auto type = reader.scalar<uint32_t>(key);
      if (type > kLastType)
        reader.fail_at(key, where, fmt::format("value type {} found, 0 to {} are allowed", type, kLastType));
      return static_cast<GgufType>(type);
    };
    GgufValue value;
    value.type = read_type();
    if (value.type == GgufType::kArray) {
      value.element = read_type();
      if (value.element == GgufType::kArray) reader.fail(key, "an array of arrays, which the format's readers refuse");
      const uint64_t where = reader.offset();
      value.count = reader.scalar<uint64_t>(key);
      value.offset = reader.offset();
      if (value.element == GgufType::kString) {
        reader.need_items(value.count, 8, key, where);
        for (uint64_t j = 0; j < value.count; ++j) reader.text(key, std::numeric_limits<uint32_t>::max());
      } else {
        reader.need_items(value.count, bytes_of(value.element), key, where);
        reader.skip(value.count * bytes_of(value.element), key);
      }
    } else {
      value.offset = reader.offset();
      if (value.type == GgufType::kString)
        reader.text(key, std::numeric_limits<uint32_t>::max());
      else
        reader.skip(bytes_of(value.type), key);
    }
    if (value.type == GgufType::kBool && file_.data()[value.offset] > 1)
      reader.fail_at(key, value.offset,
                     fmt::format("the boolean {} found, 0 and 1 are allowed", file_.data()[value.offset]));
    if (!values_.emplace(std::string(name), value).second) reader.fail_at(key, start, "the key stands twice");
  }
}

void GgufFile::read_tensors(Reader& reader, uint64_t count) {
  tensors_.reserve(count);
  std::vector<uint64_t> info_offsets;
  info_offsets.reserve(count);
  for (uint64_t i = 0; i < count; ++i) {
    std::string place = fmt::format("tensor {} of {}", i + 1, count);
    const uint64_t start = reader.offset();
    GgufTensor tensor;
    tensor.name = std::string(reader.text(place, kMaxTensorNameBytes));
    place = fmt::format("tensor \"{}\"", printable(tensor.name));
    if (tensor.name.empty()) reader.fail_at(place, start, "an empty name");
    if (!tensor_index_.emplace(tensor.name, i).second) reader.fail_at(place, start, "the tensor stands twice");
    uint64_t where = reader.offset();
    const auto dimensions = reader.scalar<uint32_t>(place);
    if (dimensions < 1 || dimensions > kMaxDimensions)
      reader.fail_at(place, where, fmt::format("{} dimensions found, 1 to {} are allowed", dimensions, kMaxDimensions));
    int64_t elements = 1;
    for (uint32_t axis = 0; axis < dimensions; ++axis) {
      where = reader.offset();
      const auto length = reader.scalar<int64_t>(place);
      if (length < 1)
        reader.fail_at(place, where, fmt::format("axis {} has length {}, at least 1 is needed", axis, length));
      if (__builtin_mul_overflow(elements, length, &elements))
        reader.fail_at(place, where,
                       fmt::format("axis {} of length {} makes the number of elements overflow", axis, length));
      tensor.shape.insert(tensor.shape.begin(), length);  // the file lists the fastest axis first
    }
    where = reader.offset();
    const auto type = reader.scalar<uint32_t>(place);
    const GgmlTypeFacts* facts = ggml_type_facts(type);
    if (!facts)
      reader.fail_at(place, where, fmt::format("tensor type {} found, supported are {}", type, ggml_type_names()));
    tensor.type = facts->type;
    const int64_t row = tensor.shape.back();
    if (row % facts->block_elements != 0)
      reader.fail_at(
          place, where,
          fmt::format("rows of {} values, {} needs a multiple of {}", row, facts->name, facts->block_elements));
    if (__builtin_mul_overflow(static_cast<uint64_t>(elements / facts->block_elements),
                               static_cast<uint64_t>(facts->block_bytes), &tensor.size))
      reader.fail_at(place, where, "the size in bytes overflows");
    info_offsets.push_back(reader.offset());
    tensor.offset = reader.scalar<uint64_t>(place);  // relative to the data section until that is known
    tensors_.push_back(std::move(tensor));
  }

  const auto padded = [&](uint64_t n) { return (n + alignment_ - 1) & ~(alignment_ - 1); };
  data_offset_ = padded(reader.offset());
  // A file may end before the padding when it has no tensors.
  const uint64_t data_bytes = file_.size() > data_offset_ ? file_.size() - data_offset_ : 0;
  uint64_t expected = 0;
  for (size_t i = 0; i < tensors_.size(); ++i) {
    GgufTensor& tensor = tensors_[i];
    const std::string place = fmt::format("tensor \"{}\"", printable(tensor.name));
    if (tensor.offset != expected)
      reader.fail_at(place, info_offsets[i],
                     fmt::format("data offset {} found, {} expected (tensors follow one another, aligned to {})",
                                 tensor.offset, expected, alignment_));
    if (expected > data_bytes || tensor.size > data_bytes - expected)
      reader.fail_at(
          place, info_offsets[i],
          fmt::format(
              "its {} bytes from data offset {} end beyond the file, whose data section has {}: a partial file?",
              tensor.size, tensor.offset, data_bytes));
    tensor.offset += data_offset_;
    expected = padded(expected + tensor.size);  // both are bounded by the file's size here
  }
}

const GgufValue* GgufFile::find(std::string_view key) const {
  const auto it = values_.find(key);
  return it == values_.end() ? nullptr : &it->second;
}

const GgufValue& GgufFile::require(std::string_view key) const {
  const GgufValue* value = find(key);
  if (!value) fail_data(fmt::format("{}: the key \"{}\" is missing", path(), key));
  return *value;
}

void GgufFile::fail_type(std::string_view key, const GgufValue& value, std::string_view wanted) const {
  const std::string found = value.type == GgufType::kArray ? fmt::format("array of {}", gguf_type_name(value.element))
                                                           : std::string(gguf_type_name(value.type));
  fail_data(fmt::format("{}: key \"{}\" (byte {}): {} found, {} expected", path(), key, value.offset, found, wanted));
}

// The string whose length stands at `offset`; checked when the file was opened.
std::string_view GgufFile::string_at(uint64_t offset) const {
  const auto length = load<uint64_t>(file_.data() + offset);
  return {reinterpret_cast<const char*>(file_.data() + offset + 8), length};
}

// No value: not an integer type, or a u64 beyond i64.
std::optional<int64_t> GgufFile::integer_at(GgufType type, uint64_t offset) const {
  const uint8_t* p = file_.data() + offset;
  switch (type) {
    case GgufType::kU8:
      return load<uint8_t>(p);
    case GgufType::kI8:
      return load<int8_t>(p);
    case GgufType::kU16:
      return load<uint16_t>(p);
    case GgufType::kI16:
      return load<int16_t>(p);
    case GgufType::kU32:
      return load<uint32_t>(p);
    case GgufType::kI32:
      return load<int32_t>(p);
    case GgufType::kI64:
      return load<int64_t>(p);
    case GgufType::kU64: {
      const auto value = load<uint64_t>(p);
      if (value > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) return std::nullopt;
      return static_cast<int64_t>(value);
    }
    default:
      return std::nullopt;
  }
}

std::string_view GgufFile::string(std::string_view key) const {
  const GgufValue& value = require(key);
  if (value.type != GgufType::kString) fail_type(key, value, "string");
  return string_at(value.offset);
}
std::string_view GgufFile::string_or(std::string_view key, std::string_view fallback) const {
  return has(key) ? string(key) : fallback;
}

int64_t GgufFile::integer(std::string_view key, int64_t lowest, int64_t highest) const {
  const GgufValue& value = require(key);
  const std::optional<int64_t> n = integer_at(value.type, value.offset);
  if (!n) fail_type(key, value, fmt::format("an integer from {} to {}", lowest, highest));
  if (*n < lowest || *n > highest)
    fail_data(fmt::format("{}: key \"{}\" (byte {}): {} found, {} to {} are allowed", path(), key, value.offset, *n,
                          lowest, highest));
  return *n;
}
int64_t GgufFile::integer_or(std::string_view key, int64_t lowest, int64_t highest, int64_t fallback) const {
  return has(key) ? integer(key, lowest, highest) : fallback;
}

double GgufFile::number(std::string_view key) const {
  const GgufValue& value = require(key);
  double n = 0;
  if (value.type == GgufType::kF32)
    n = static_cast<double>(load<float>(file_.data() + value.offset));
  else if (value.type == GgufType::kF64)
    n = load<double>(file_.data() + value.offset);
  else
    fail_type(key, value, "f32 or f64");
  if (!std::isfinite(n))
    fail_data(fmt::format("{}: key \"{}\" (byte {}): {} is not finite", path(), key, value.offset, n));
  return n;
}
double GgufFile::number_or(std::string_view key, double fallback) const { return has(key) ? number(key) : fallback; }

bool GgufFile::boolean_or(std::string_view key, bool fallback) const {
  const GgufValue* value = find(key);
  if (!value) return fallback;
  if (value->type != GgufType::kBool) fail_type(key, *value, "bool");
  return file_.data()[value->offset] != 0;
}

std::vector<std::string_view> GgufFile::strings(std::string_view key) const {
  const GgufValue& value = require(key);
  if (value.type != GgufType::kArray || value.element != GgufType::kString) fail_type(key, value, "array of string");
  std::vector<std::string_view> out;
  out.reserve(value.count);
  uint64_t offset = value.offset;
  for (uint64_t i = 0; i < value.count; ++i) {
    out.push_back(string_at(offset));
    offset += 8 + out.back().size();
  }
  return out;
}

std::vector<int64_t> GgufFile::integers(std::string_view key) const {
  const GgufValue& value = require(key);
  const bool is_integer = value.type == GgufType::kArray && bytes_of(value.element) > 0 &&
                          value.element != GgufType::kF32 && value.element != GgufType::kF64 &&
                          value.element != GgufType::kBool;
  if (!is_integer) fail_type(key, value, "array of integers");
  std::vector<int64_t> out;
  out.reserve(value.count);  // at most eight times the bytes of the file: a u8 array is the worst case
  for (uint64_t i = 0; i < value.count; ++i) {
    const std::optional<int64_t> n = integer_at(value.element, value.offset + i * bytes_of(value.element));
    if (!n) fail_type(key, value, "array of integers below 2^63");
    out.push_back(*n);
  }
  return out;
}

std::vector<float> GgufFile::floats(std::string_view key) const {
  const GgufValue& value = require(key);
  if (value.type != GgufType::kArray || value.element != GgufType::kF32) fail_type(key, value, "array of f32");
  std::vector<float> out(value.count);
  if (value.count > 0) std::memcpy(out.data(), file_.data() + value.offset, value.count * sizeof(float));
  return out;
}

const GgufTensor* GgufFile::find_tensor(std::string_view name) const {
  const auto it = tensor_index_.find(name);
  return it == tensor_index_.end() ? nullptr : &tensors_[it->second];
}

std::span<const uint8_t> GgufFile::tensor_bytes(const GgufTensor& tensor) const {
  return file_.bytes().subspan(tensor.offset, tensor.size);
}

}  // namespace vqkv
