#include "io/safetensors.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <limits>
#include <set>

#include "core/error.h"
#include "core/json.h"
#include "io/atomic_file.h"
#include "io/ggml_dequant.h"

namespace vqkv {
namespace {

constexpr uint64_t kMaxHeaderBytes = 100'000'000;
constexpr size_t kMaxAxes = 16;
constexpr int64_t kMaxIndexBytes = 100'000'000;

struct ItemType {
  std::string_view name;
  uint64_t bytes;
};
constexpr ItemType kItemTypes[] = {{"F64", 8},  {"F32", 4},     {"F16", 2},     {"BF16", 2}, {"I64", 8}, {"I32", 4},
                                   {"I16", 2},  {"I8", 1},      {"U64", 8},     {"U32", 4},  {"U16", 2}, {"U8", 1},
                                   {"BOOL", 1}, {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"C64", 8}};

uint64_t item_bytes(std::string_view dtype) {
  for (const auto& t : kItemTypes)
    if (t.name == dtype) return t.bytes;
  return 0;
}

std::string shown(const Json& value) {
  std::string text = value.dump(-1, ' ', true, Json::error_handler_t::replace);
  if (text.size() > 80) text = text.substr(0, 80) + "...";
  return text;
}

// A JSON integer in [0, 2^63); -1 for anything else.
int64_t natural(const Json& value) {
  if (!value.is_number_unsigned()) return -1;
  const auto n = value.get<uint64_t>();
  return n > static_cast<uint64_t>(std::numeric_limits<int64_t>::max()) ? -1 : static_cast<int64_t>(n);
}

SafeTensor read_entry(const std::string& path, const std::string& name, const Json& entry, uint64_t data_bytes) {
  const auto fail = [&](const std::string& problem) {
    fail_data(fmt::format("{}: tensor {}: {}", path, shown(Json(name)), problem));
  };
  if (!entry.is_object())
    fail(fmt::format("{} found, an object with dtype, shape and data_offsets expected", shown(entry)));
  for (const auto& [key, value] : entry.items())
    if (key != "dtype" && key != "shape" && key != "data_offsets")
      fail(fmt::format("the unknown field {}", shown(Json(key))));
  SafeTensor t;
  t.name = name;
  const auto dtype = entry.find("dtype");
  if (dtype == entry.end() || !dtype->is_string()) fail("dtype is missing or not a string");
  t.dtype = dtype->get<std::string>();
  const uint64_t bytes = item_bytes(t.dtype);
  if (bytes == 0) fail(fmt::format("the unknown dtype {}", shown(*dtype)));

  const auto shape = entry.find("shape");
  if (shape == entry.end() || !shape->is_array() || shape->size() > kMaxAxes)
    fail(fmt::format("shape is missing or not a list of at most {} lengths", kMaxAxes));
  for (const Json& axis : *shape) {
    const int64_t length = natural(axis);
    if (length < 0) fail(fmt::format("an axis of length {}", shown(axis)));
    if (__builtin_mul_overflow(t.elements, length, &t.elements)) fail(fmt::format("shape {} overflows", shown(*shape)));
    t.shape.push_back(length);
  }
  if (__builtin_mul_overflow(static_cast<uint64_t>(t.elements), bytes, &t.size))
    fail(fmt::format("shape {} overflows", shown(*shape)));

  const auto range = entry.find("data_offsets");
  if (range == entry.end() || !range->is_array() || range->size() != 2)
    fail("data_offsets is missing or not [begin, end]");
  const int64_t begin = natural((*range)[0]), end = natural((*range)[1]);
  if (begin < 0 || end < begin) fail(fmt::format("data_offsets {} found, 0 <= begin <= end expected", shown(*range)));
  if (static_cast<uint64_t>(end) > data_bytes)
    fail(fmt::format("data_offsets {} end beyond the file, whose data has {} bytes: a partial file?", shown(*range),
                     data_bytes));
  if (static_cast<uint64_t>(end - begin) != t.size)
    fail(fmt::format("data_offsets {} hold {} bytes, shape {} of {} needs {}", shown(*range), end - begin,
                     shown(*shape), t.dtype, t.size));
  t.offset = static_cast<uint64_t>(begin);
  return t;
}

}  // namespace

SafetensorsFile::SafetensorsFile(const std::string& path) : file_(path) {
  uint64_t header_bytes = 0;
  if (file_.size() < sizeof header_bytes)
    fail_data(fmt::format("{}: {} bytes, a header length of 8 is needed", path, file_.size()));
  std::memcpy(&header_bytes, file_.data(), sizeof header_bytes);
  if (header_bytes > kMaxHeaderBytes)
    fail_data(fmt::format("{}: a header of {} bytes, at most {} are allowed (not a safetensors file?)", path,
                          header_bytes, kMaxHeaderBytes));
  if (header_bytes > file_.size() - 8)
    fail_data(fmt::format("{}: a header of {} bytes, the file ends after {} more: a partial file?", path, header_bytes,
                          file_.size() - 8));
  const std::string_view text(reinterpret_cast<const char*>(file_.data()) + 8, header_bytes);
  if (text.empty() || text.front() != '{') fail_data(fmt::format("{}: the header doesn't begin with '{{'", path));
  const Json header = parse_json(text, path + " (header)");
  const uint64_t data_start = 8 + header_bytes;
  const uint64_t data_bytes = file_.size() - data_start;

  for (const auto& [name, entry] : header.items()) {
    if (name != "__metadata__") {
      tensors_.push_back(read_entry(path, name, entry, data_bytes));
      continue;
    }
    if (!entry.is_object()) fail_data(fmt::format("{}: __metadata__ is not an object", path));
    for (const auto& [key, value] : entry.items()) {
      if (!value.is_string()) fail_data(fmt::format("{}: __metadata__ {} is not a string", path, shown(Json(key))));
      metadata_[key] = value.get<std::string>();
    }
  }
  // Sorted by place, each tensor must begin where the one before ended: no overlap, no hole, nothing after the last.
  std::stable_sort(tensors_.begin(), tensors_.end(), [](const SafeTensor& a, const SafeTensor& b) {
    return a.offset != b.offset ? a.offset < b.offset : a.size < b.size;
  });
  uint64_t expected = 0;
  for (SafeTensor& t : tensors_) {
    if (t.offset != expected)
      fail_data(fmt::format("{}: tensor {}: data begins at {}, {} expected: {}", path, shown(Json(t.name)), t.offset,
                            expected, t.offset < expected ? "it overlaps another tensor" : "a hole before it"));
    expected += t.size;
    t.offset += data_start;
  }
  if (expected != data_bytes)
    fail_data(
        fmt::format("{}: the tensors hold {} bytes, the file has {} after its header", path, expected, data_bytes));
  for (size_t i = 0; i < tensors_.size(); ++i) index_.emplace(tensors_[i].name, i);
}

const SafeTensor* SafetensorsFile::find(std::string_view name) const {
  const auto it = index_.find(name);
  return it == index_.end() ? nullptr : &tensors_[it->second];
}

std::span<const uint8_t> SafetensorsFile::tensor_bytes(const SafeTensor& tensor) const {
  return file_.bytes().subspan(tensor.offset, tensor.size);
}

void SafetensorsFile::read(const SafeTensor& tensor, float* out) const {
  const uint8_t* in = file_.data() + tensor.offset;
  if (tensor.dtype == "F32")
    ggml_dequantize(GgmlType::kF32, in, out, tensor.elements);
  else if (tensor.dtype == "F16")
    ggml_dequantize(GgmlType::kF16, in, out, tensor.elements);
  else if (tensor.dtype == "BF16")
    ggml_dequantize(GgmlType::kBF16, in, out, tensor.elements);
  else
    fail_data(fmt::format("{}: tensor {}: dtype {} found, F32, F16 and BF16 are read", path(), shown(Json(tensor.name)),
                          tensor.dtype));
}

SafetensorsFolder::SafetensorsFolder(const std::string& folder) {
  namespace fs = std::filesystem;
  const fs::path single = fs::path(folder) / "model.safetensors",
                 index_path = fs::path(folder) / "model.safetensors.index.json";
  std::error_code ignored;
  if (fs::exists(single, ignored)) {
    files_.push_back(std::make_unique<SafetensorsFile>(single.string()));
    for (const SafeTensor& t : files_[0]->tensors()) index_[t.name] = {files_[0].get(), &t};
    return;
  }
  if (!fs::exists(index_path, ignored))
    fail_data(
        fmt::format("{}: neither model.safetensors nor model.safetensors.index.json is there; weights are read from "
                    "safetensors only",
                    folder));

  const std::string where = index_path.string();
  const Json index = parse_json(read_file(where, kMaxIndexBytes), where);
  const auto map = index.is_object() ? index.find("weight_map") : index.end();
  if (!index.is_object() || map == index.end() || !map->is_object() || map->empty())
    fail_data(fmt::format("{}: weight_map is missing, empty or not an object", where));
  std::set<std::string> shards;
  for (const auto& [name, file] : map->items()) {
    // A plain name: an index must not reach outside its folder.
    const std::string shard = file.is_string() ? file.get<std::string>() : "";
    if (shard.empty() || shard.front() == '.' || shard.find('/') != std::string::npos ||
        shard.find('\0') != std::string::npos)
      fail_data(fmt::format("{}: weight_map sends {} to {}, the name of a file in the same folder expected", where,
                            shown(Json(name)), shown(file)));
    shards.insert(shard);
  }
  for (const std::string& shard : shards) {
    if (!fs::exists(fs::path(folder) / shard, ignored))
      fail_data(fmt::format("{}: the shard {} is missing: a partial download?", where, shard));
    files_.push_back(std::make_unique<SafetensorsFile>((fs::path(folder) / shard).string()));
    for (const SafeTensor& t : files_.back()->tensors()) {
      const auto entry = map->find(t.name);
      if (entry == map->end() || entry->get<std::string>() != shard)
        fail_data(fmt::format("{}: tensor {} of shard {} is {} by weight_map", where, shown(Json(t.name)), shard,
                              entry == map->end() ? "not listed" : "placed in another shard"));
      index_[t.name] = {files_.back().get(), &t};
    }
  }
  for (const auto& [name, file] : map->items())
    if (!index_.contains(name))
      fail_data(fmt::format("{}: tensor {} is not in its shard {}", where, shown(Json(name)), shown(file)));
}

SafetensorsFolder::Place SafetensorsFolder::find(std::string_view name) const {
  const auto it = index_.find(name);
  return it == index_.end() ? Place{nullptr, nullptr} : it->second;
}

std::vector<std::string> SafetensorsFolder::names() const {
  std::vector<std::string> out;
  for (const auto& [name, place] : index_) out.push_back(name);
  return out;
}

}  // namespace vqkv
