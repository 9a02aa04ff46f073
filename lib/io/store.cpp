#include "io/store.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <thread>

#include "core/error.h"
#include "io/atomic_file.h"

namespace vqkv {
namespace {

int open_or_fail(const std::string& path) {
  std::error_code ec;
  const auto parent = std::filesystem::path(path).parent_path();
  if (!parent.empty()) std::filesystem::create_directories(parent, ec);
  const int fd = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
  if (fd < 0) fail_data(fmt::format("{}: can't be opened for writing: {}", path, std::strerror(errno)));
  return fd;
}

bool is_object_text(std::string_view line, const std::string& where) {
  try {
    return parse_json(line, where).is_object();
  } catch (const Error&) { return false; }
}

// Bytes of a file up to the end of its last complete line, with `complete` false when that line lacks its newline.
int64_t good_length(int fd, const std::string& path, int64_t size, bool& newline_missing) {
  newline_missing = false;
  if (size == 0) return 0;
  constexpr int64_t kMaxTail = int64_t{1} << 28;  // far above any record
  std::string tail;
  for (int64_t want = 1 << 16;; want *= 4) {
    const int64_t n = std::min(want, size);
    tail.resize(static_cast<size_t>(n));
    if (::pread(fd, tail.data(), tail.size(), size - n) != n)
      fail_data(fmt::format("{}: can't be read: {}", path, std::strerror(errno)));
    if (tail.back() == '\n') return size;
    const size_t last = tail.rfind('\n');
    if (last == std::string::npos && n < size && n < kMaxTail) continue;
    const size_t start = last == std::string::npos ? 0 : last + 1;
    if (last == std::string::npos && n < size) fail_data(fmt::format("{}: not a file of JSON lines", path));
    if (is_object_text(std::string_view(tail).substr(start), path)) {
      newline_missing = true;
      return size;
    }
    return size - n + static_cast<int64_t>(start);
  }
}

void write_all(int fd, std::string_view bytes, const std::string& path) {
  while (!bytes.empty()) {
    const ssize_t n = ::write(fd, bytes.data(), bytes.size());
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) fail_data(fmt::format("{}: {} bytes can't be appended: {}", path, bytes.size(), std::strerror(errno)));
    bytes.remove_prefix(static_cast<size_t>(n));
  }
}

}  // namespace

JsonlRead parse_jsonl(std::string_view text, const std::string& where, int64_t first_line) {
  JsonlRead out;
  const auto keep = [&](Json&& record, int64_t) { out.records.push_back(std::move(record)); };
  out.torn = parse_jsonl(text, where, keep, first_line);
  return out;
}

std::string parse_jsonl(std::string_view text, const std::string& where,
                        const std::function<void(Json&& record, int64_t line)>& body, int64_t first_line) {
  int64_t number = first_line - 1;
  while (!text.empty()) {
    ++number;
    const size_t end = text.find('\n');
    const std::string_view line = text.substr(0, end);
    text = end == std::string_view::npos ? std::string_view() : text.substr(end + 1);
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) continue;
    const std::string place = fmt::format("{} line {}", where, number);
    Json record;
    try {
      record = parse_json(line, place);
      if (!record.is_object()) fail_data(fmt::format("{}: a JSON object is expected", place));
    } catch (const Error&) {
      if (end != std::string_view::npos) throw;
      return fmt::format("{}: {} bytes of an unfinished record", place, line.size());
    }
    body(std::move(record), number);
  }
  return "";
}

JsonlWriter::JsonlWriter(std::string path) : path_(std::move(path)) {
  fd_ = open_or_fail(path_);
  if (::flock(fd_, LOCK_EX | LOCK_NB) != 0) {
    const int e = errno;
    ::close(fd_);
    fd_ = -1;
    if (e == EWOULDBLOCK)
      fail_usage(
          fmt::format("{}: another run is writing this file; wait for it, or give this run a name of its own with "
                      "--writer NAME or --shard i/n",
                      path_));
    fail_data(fmt::format("{}: can't be locked: {}", path_, std::strerror(e)));
  }
  try {
    struct stat info {};
    if (::fstat(fd_, &info) != 0) fail_data(fmt::format("{}: {}", path_, std::strerror(errno)));
    bool newline_missing = false;
    const int64_t good = good_length(fd_, path_, info.st_size, newline_missing);
    if (good != info.st_size && ::ftruncate(fd_, good) != 0)
      fail_data(fmt::format("{}: {}", path_, std::strerror(errno)));
    if (::lseek(fd_, 0, SEEK_END) < 0) fail_data(fmt::format("{}: {}", path_, std::strerror(errno)));
    if (newline_missing) write_all(fd_, "\n", path_);
  } catch (...) {
    ::close(fd_);
    throw;
  }
}

JsonlWriter::~JsonlWriter() {
  if (fd_ >= 0) ::close(fd_);
}

int64_t JsonlWriter::size() const {
  const off_t end = ::lseek(fd_, 0, SEEK_END);
  if (end < 0) fail_data(fmt::format("{}: {}", path_, std::strerror(errno)));
  return static_cast<int64_t>(end);
}

void JsonlWriter::append(const Json& record) {
  const std::string line = record.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
  const off_t before = static_cast<off_t>(size());
  try {
    write_all(fd_, line, path_);
    if (::fsync(fd_) != 0) fail_data(fmt::format("{}: can't be synced: {}", path_, std::strerror(errno)));
  } catch (const Error& e) {
    if (::ftruncate(fd_, before) != 0)
      fail_data(fmt::format("{}; and its end can't be cut back: {}", e.what(), std::strerror(errno)));
    throw;
  }
}

FileLock::FileLock(const std::string& path, const std::function<void()>& waiting) {
  fd_ = open_or_fail(path);
  while (::flock(fd_, waiting ? LOCK_EX | LOCK_NB : LOCK_EX) != 0) {
    const int e = errno;
    if (e == EINTR) continue;
    try {
      if (e != EWOULDBLOCK) fail_data(fmt::format("{}: can't be locked: {}", path, std::strerror(e)));
      waiting();
    } catch (...) {
      ::close(fd_);
      throw;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  }
}

FileLock::~FileLock() { ::close(fd_); }

}  // namespace vqkv
