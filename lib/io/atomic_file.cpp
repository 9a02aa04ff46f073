#include "io/atomic_file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <utility>

#include "core/error.h"

namespace vqkv {
namespace {

std::string folder_of(const std::string& path) {
  const std::string folder = std::filesystem::path(path).parent_path().string();
  return folder.empty() ? "." : folder;
}

// Bytes this user may still write on the file system of `path`, or -1 when that is unknown.
int64_t free_bytes(const std::string& path) {
  struct statvfs info {};
  if (::statvfs(folder_of(path).c_str(), &info) != 0) return -1;
  return static_cast<int64_t>(info.f_bavail) * static_cast<int64_t>(info.f_frsize);
}

[[noreturn]] void fail_write(const std::string& path, int error, size_t needed) {
  if (error == ENOSPC || error == EDQUOT)
    fail_data(fmt::format("{}: the disk is full: {} bytes still to write, {} free", path, needed, free_bytes(path)));
  fail_data(fmt::format("{}: can't be written: {}", path, std::strerror(error)));
}

bool same_file(int fd, const std::string& path) {
  struct stat a {
  }, b{};
  return ::fstat(fd, &a) == 0 && ::stat(path.c_str(), &b) == 0 && a.st_ino == b.st_ino && a.st_dev == b.st_dev;
}

// Open-file-description locks, since HDF5 takes flock() on the same file through a descriptor of its own, and classic
// POSIX locks vanish as soon as any descriptor of the process is closed.
enum class Lock { kTaken, kBusy };
Lock lock_exclusively(int fd) {
  struct flock lock {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  if (::fcntl(fd, F_OFD_SETLK, &lock) == 0) return Lock::kTaken;
  // A file system without locks (ENOLCK, EINVAL) can't tell two writers apart; writing is still right for one.
  return errno == EACCES || errno == EAGAIN ? Lock::kBusy : Lock::kTaken;
}

// The file that `path` names through links. What is there and is no file would be replaced by one, so it is refused.
std::string file_behind(std::string path) {
  namespace fs = std::filesystem;
  std::error_code ec;
  for (int links = 0; links < 40 && fs::is_symlink(path, ec); ++links) {
    const fs::path to = fs::read_symlink(path, ec);
    if (ec) break;
    path = (fs::path(path).parent_path() / to).string();
  }
  const fs::file_status there = fs::status(path, ec);
  if (fs::exists(there) && !fs::is_regular_file(there))
    fail_data(fmt::format("{}: is {}; a regular file is written here", path,
                          fs::is_directory(there) ? "a folder" : "a device, pipe or socket"));
  return path;
}

}  // namespace

AtomicFile::AtomicFile(std::string path) : path_(file_behind(std::move(path))), partial_(path_ + ".partial") {
  while (true) {
    fd_ = ::open(partial_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (fd_ < 0) fail_data(fmt::format("{}: can't be created: {}", partial_, std::strerror(errno)));
    if (lock_exclusively(fd_) == Lock::kBusy) {
      ::close(fd_);
      fd_ = -1;
      fail_data(fmt::format("{}: another process is writing this file", partial_));
    }
    if (same_file(fd_, partial_)) break;
    ::close(fd_);  // its writer committed between our open and our lock: this is the finished file, leave it alone
  }
  if (::ftruncate(fd_, 0) != 0 && errno != EINVAL) {  // EINVAL: a device, which has no length
    const int error = errno;
    ::close(fd_);
    fd_ = -1;
    fail_write(partial_, error, 0);
  }
}

AtomicFile::~AtomicFile() {
  if (!committed_ && fd_ >= 0 && same_file(fd_, partial_)) ::unlink(partial_.c_str());
  if (fd_ >= 0) ::close(fd_);
}

void AtomicFile::write(std::string_view bytes) {
  VQKV_CHECK(!committed_ && fd_ >= 0);
  while (!bytes.empty()) {
    const ssize_t n = ::write(fd_, bytes.data(), std::min(bytes.size(), size_t{1} << 30));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail_write(partial_, errno, bytes.size());
    bytes.remove_prefix(static_cast<size_t>(n));
  }
}

void AtomicFile::start_writing_out() {
  VQKV_CHECK(!committed_ && fd_ >= 0);
  // A hint: where it isn't understood, and where the disk is full, commit() says what there is to say.
  ::sync_file_range(fd_, 0, 0, SYNC_FILE_RANGE_WRITE);
}

void AtomicFile::commit() {
  VQKV_CHECK(!committed_ && fd_ >= 0);
  if (::fsync(fd_) != 0) fail_write(partial_, errno, 0);
  if (!same_file(fd_, partial_)) fail_data(fmt::format("{}: was removed or replaced while it was written", partial_));
  if (::rename(partial_.c_str(), path_.c_str()) != 0)
    fail_data(fmt::format("{}: can't be renamed to {}: {}", partial_, path_, std::strerror(errno)));
  committed_ = true;
  ::close(fd_);
  fd_ = -1;
  // The new name itself must reach the disk too.
  const std::string folder = folder_of(path_);
  const int fd = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0)
    fail_data(fmt::format("{}: can't be opened to make the new file durable: {}", folder, std::strerror(errno)));
  // EINVAL: a file system that has no fsync for folders.
  const int error = ::fsync(fd) == 0 ? 0 : errno;
  ::close(fd);
  if (error != 0 && error != EINVAL && error != EROFS) fail_write(folder, error, 0);
}

void require_writable(const std::string& path) { AtomicFile{path}; }

void write_file(const std::string& path, std::string_view bytes) {
  AtomicFile file(path);
  file.write(bytes);
  file.commit();
}

std::string read_file(const std::string& path, int64_t max_bytes) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) fail_data(fmt::format("{}: can't be opened for reading: {}", path, std::strerror(errno)));
  const auto closed = [fd](int error) {
    ::close(fd);
    return error;
  };
  struct stat info {};
  if (::fstat(fd, &info) != 0 || S_ISDIR(info.st_mode)) {
    closed(0);
    fail_data(fmt::format("{}: is a folder, a file is needed", path));
  }
  // Pipes have no size, so the limit is also held while reading.
  if (info.st_size > max_bytes) {
    closed(0);
    fail_data(fmt::format("{}: has {} bytes, at most {} are allowed here", path, info.st_size, max_bytes));
  }
  std::string out;
  out.reserve(static_cast<size_t>(info.st_size));
  std::string buffer(size_t{1} << 16, '\0');
  while (true) {
    const ssize_t n = ::read(fd, buffer.data(), buffer.size());
    if (n == 0) break;
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) {
      const int error = closed(errno);
      fail_data(fmt::format("{}: can't be read: {}", path, std::strerror(error)));
    }
    if (static_cast<int64_t>(out.size()) + n > max_bytes) {
      closed(0);
      fail_data(fmt::format("{}: has more than the {} bytes allowed here", path, max_bytes));
    }
    out.append(buffer.data(), static_cast<size_t>(n));
  }
  closed(0);
  return out;
}

void require_free_space(const std::string& path, int64_t bytes) {
  const int64_t free = free_bytes(path);
  if (free < 0) fail_data(fmt::format("{}: the folder {} can't be reached", path, folder_of(path)));
  if (free < bytes) fail_data(fmt::format("{}: the disk is too full: {} bytes needed, {} free", path, bytes, free));
}

}  // namespace vqkv
