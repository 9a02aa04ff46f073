// Writers of small model files for tests: valid ones, and ones damaged on purpose.
#pragma once
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "core/json.h"

namespace vqkv::testing {

// A fresh folder, removed at the end.
class TempFolder {
 public:
  TempFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "vqkv-test-XXXXXX").string();
    if (!::mkdtemp(name.data())) throw std::runtime_error("mkdtemp failed");
    path_ = name;
  }
  ~TempFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;
  std::string file(const std::string& name) const { return (path_ / name).string(); }
  std::string path() const { return path_.string(); }
  std::string write(const std::string& name, std::string_view bytes) const {
    std::ofstream(file(name), std::ios::binary | std::ios::trunc)
        .write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    return file(name);
  }

 private:
  std::filesystem::path path_;
};

template <class T>
std::string raw(T value) {
  return {reinterpret_cast<const char*>(&value), sizeof value};
}
inline std::string raw(const std::vector<float>& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float)};
}
inline std::string gguf_text(std::string_view text) { return raw(uint64_t{text.size()}) + std::string(text); }

// Every part can be set to something wrong. build() does no checks.
struct GgufBuilder {
  uint32_t version = 3;
  int64_t alignment = 32;
  int64_t tensor_count = -1, value_count = -1;  // -1: as they are
  struct Value {
    std::string key, payload;
    uint32_t type;
  };
  struct Tensor {
    std::string name;
    std::vector<int64_t> shape;
    uint32_t type;
    std::string data;
    int64_t offset;
  };  // -1: right
  std::vector<Value> values;
  std::vector<Tensor> tensors;

  GgufBuilder& u32(const std::string& key, uint32_t v) {
    values.push_back({key, raw(v), 4});
    return *this;
  }
  GgufBuilder& f32(const std::string& key, float v) {
    values.push_back({key, raw(v), 6});
    return *this;
  }
  GgufBuilder& flag(const std::string& key, bool v) {
    values.push_back({key, raw(uint8_t{v}), 7});
    return *this;
  }
  GgufBuilder& text(const std::string& key, std::string_view v) {
    values.push_back({key, gguf_text(v), 8});
    return *this;
  }
  // shape: slowest axis first, as everywhere but in the file.
  GgufBuilder& tensor(const std::string& name, std::vector<int64_t> shape, const std::vector<float>& v) {
    tensors.push_back({name, std::move(shape), 0, raw(v), -1});
    return *this;
  }
  Value& value(const std::string& key) {
    for (auto& v : values)
      if (v.key == key) return v;
    throw std::runtime_error("no key " + key);
  }
  Tensor& at(const std::string& name) {
    for (auto& t : tensors)
      if (t.name == name) return t;
    throw std::runtime_error("no tensor " + name);
  }
  void drop(const std::string& name) {
    std::erase_if(values, [&](const Value& v) { return v.key == name; });
    std::erase_if(tensors, [&](const Tensor& t) { return t.name == name; });
  }

  std::string build() const {
    std::string out = "GGUF" + raw(version) + raw(tensor_count == -1 ? int64_t(tensors.size()) : tensor_count) +
                      raw(value_count == -1 ? int64_t(values.size()) : value_count);
    for (const auto& v : values) out += gguf_text(v.key) + raw(v.type) + v.payload;
    const auto padded = [&](size_t n) { return (n + size_t(alignment) - 1) / size_t(alignment) * size_t(alignment); };
    size_t offset = 0;
    for (const auto& t : tensors) {
      out += gguf_text(t.name) + raw(uint32_t(t.shape.size()));
      for (size_t i = t.shape.size(); i-- > 0;) out += raw(t.shape[i]);
      out += raw(t.type) + raw(t.offset < 0 ? uint64_t{offset} : uint64_t(t.offset));
      offset = padded(offset + t.data.size());
    }
    for (const auto& t : tensors) {
      out.resize(padded(out.size()));
      out += t.data;
    }
    return out;
  }
};

inline std::string safetensors_bytes(const std::string& header, const std::string& data) {
  return raw(uint64_t{header.size()}) + header + data;
}

// F32 tensors, one after the other.
struct SafetensorsBuilder {
  Json header = Json::object();
  std::string data;
  SafetensorsBuilder& tensor(const std::string& name, std::vector<int64_t> shape, const std::vector<float>& v) {
    const size_t begin = data.size();
    data += raw(v);
    header[name] = {{"dtype", "F32"}, {"shape", shape}, {"data_offsets", {begin, data.size()}}};
    return *this;
  }
  SafetensorsBuilder& rename(const std::string& from, const std::string& to) {
    const Json entry = header.at(from);
    header.erase(from);
    header[to] = entry;
    return *this;
  }
  std::string build() const { return safetensors_bytes(header.dump(), data); }
};

}  // namespace vqkv::testing
