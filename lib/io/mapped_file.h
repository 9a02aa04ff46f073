// A read-only mapping of a whole file.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace vqkv {

// Maps a regular, non-empty file; anything else is kBadData naming the path. The size is the one at opening: a file
// that another process shortens while it is mapped can't be read safely by any mapping, so model files must not be
// edited while a tool runs.
class MappedFile {
 public:
  explicit MappedFile(std::string path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&&) = delete;
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const std::string& path() const { return path_; }
  const uint8_t* data() const { return data_; }
  size_t size() const { return size_; }
  std::span<const uint8_t> bytes() const { return {data_, size_}; }

 private:
  std::string path_;
  const uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace vqkv
