// Files appear under their final name complete or not at all.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>

namespace vqkv {

// PATH.partial until commit(): fsync, rename. The destructor removes what was not committed. A full disk is kBadData
// naming path, bytes needed and free.
class AtomicFile {
 public:
  explicit AtomicFile(std::string path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  const std::string& partial_path() const { return partial_; }
  void write(std::string_view bytes);  // through our own descriptor; libraries write to partial_path() themselves
  // Asks the system to begin writing out what the file holds so far, and doesn't wait: commit() then finds little left.
  void start_writing_out();
  void commit();

 private:
  std::string path_, partial_;
  int fd_ = -1;
  bool committed_ = false;
};

// Throws what writing `path` would throw as soon as it began, so that long work does not end without its file.
void require_writable(const std::string& path);
void write_file(const std::string& path, std::string_view bytes);
std::string read_file(const std::string& path, int64_t max_bytes = int64_t{1} << 32);
// Throws kBadData when the file system of `path` has fewer than `bytes` free.
void require_free_space(const std::string& path, int64_t bytes);

}  // namespace vqkv
