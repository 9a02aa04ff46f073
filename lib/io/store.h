// Records that survive a kill: JSON lines, one writer a file, every line synced. A last line that a kill tore is
// tolerated and reported; anything else that is not JSON is an error with its line.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "core/json.h"

namespace vqkv {

struct JsonlRead {
  std::vector<Json> records;
  std::string torn;  // what was dropped at the end: "FILE line 7: 123 bytes of an unfinished record", or ""
};

// `where` names the text. Throws kBadData for a line that is not an object, except an unfinished last one.
// first_line: of the text in its file.
JsonlRead parse_jsonl(std::string_view text, const std::string& where, int64_t first_line = 1);

// The same with one record in memory at a time; line: counted from 1. Gives what was dropped at the end.
std::string parse_jsonl(std::string_view text, const std::string& where,
                        const std::function<void(Json&& record, int64_t line)>& body, int64_t first_line = 1);

// Appends to one file, created when missing, with its folder. Holds a lock for its life: a second writer of the same
// file is refused (kUsage), here or on another machine. An unfinished last line is cut off first.
class JsonlWriter {
 public:
  explicit JsonlWriter(std::string path);
  ~JsonlWriter();
  JsonlWriter(const JsonlWriter&) = delete;
  JsonlWriter& operator=(const JsonlWriter&) = delete;
  // One write, then fsync. When it fails (a full disk) the file ends where it did before, and kBadData says so.
  void append(const Json& record);
  int64_t size() const;  // bytes of the file

 private:
  std::string path_;
  int fd_ = -1;
};

// An exclusive lock on PATH (created when missing) for the life of the object; waits for it. `waiting` is called now
// and then meanwhile, and may throw to give up.
class FileLock {
 public:
  explicit FileLock(const std::string& path, const std::function<void()>& waiting = {});
  ~FileLock();
  FileLock(const FileLock&) = delete;
  FileLock& operator=(const FileLock&) = delete;

 private:
  int fd_ = -1;
};

}  // namespace vqkv
