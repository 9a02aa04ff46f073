#include "io/trace_check.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <sys/stat.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <optional>

#include "core/clock.h"
#include "core/error.h"
#include "core/json.h"
#include "core/log.h"
#include "io/atomic_file.h"
#include "io/store.h"

namespace vqkv {
namespace {

// The time of status change tells an edit that put the modification time back.
Json state_of(const std::string& path) {
  struct stat s {};
  if (::stat(path.c_str(), &s) != 0) fail_data(fmt::format("{}: {}", path, std::strerror(errno)));
  const auto nanoseconds = [](const timespec& t) { return int64_t{t.tv_sec} * 1'000'000'000 + t.tv_nsec; };
  return {{"size", static_cast<int64_t>(s.st_size)},
          {"modified_ns", nanoseconds(s.st_mtim)},
          {"changed_ns", nanoseconds(s.st_ctim)},
          {"inode", static_cast<uint64_t>(s.st_ino)}};
}

// What PATH.verified says, or null; a file that a crash left torn says nothing.
Json remembered(const std::string& record) {
  try {
    return parse_json(read_file(record), record);
  } catch (const Error&) { return nullptr; }
}

}  // namespace

std::shared_ptr<const TraceReader> open_verified_trace(const std::string& path) {
  const std::string record = path + ".verified";
  Json state = state_of(path);
  const auto reader = std::make_shared<const TraceReader>(path);  // before a file is made beside what is no trace
  state["content_xxh3"] = reader->info().content_hash;
  std::optional<FileLock> lock;
  try {
    lock.emplace(record);
  } catch (const Error& e) {
    log_info(fmt::format("{}; the trace is read once more to verify it, in every run", e.what()));
  }
  if (!lock || remembered(record) != state) {
    const Stopwatch watch;
    const std::vector<std::string> problems = reader->verify();
    if (!problems.empty()) fail_data(fmt::format("{}: {}", path, fmt::join(problems, "; ")));
    log_info(fmt::format("{}: its values are those of its content hash ({:.1f} s)", path, watch.seconds()));
  }
  // Held open since, the file itself can't be another; its bytes can.
  Json now = state_of(path);
  now["content_xxh3"] = state["content_xxh3"];
  if (now != state) fail_data(fmt::format("{}: changed while it was verified; another process is writing it", path));
  if (lock) std::ofstream(record) << state.dump() << "\n";
  return reader;
}

}  // namespace vqkv
