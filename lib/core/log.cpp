#include "core/log.h"

#include <fmt/format.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <mutex>

#include "core/clock.h"
#include "core/terminal.h"

namespace vqkv {
namespace {
std::atomic<LogLevel> g_level{LogLevel::kInfo};
std::mutex g_log_mutex;
void write_line(const std::string& line) {
  const std::lock_guard lock(g_log_mutex);
  std::fwrite(line.data(), 1, line.size(), stderr);
}
}  // namespace

void set_log_level(LogLevel level) { g_level = level; }
LogLevel log_level() { return g_level; }
void log_warning(const std::string& m) {
  if (log_level() >= LogLevel::kWarning) write_line("warning: " + m + "\n");
}
void log_info(const std::string& m) {
  if (log_level() >= LogLevel::kInfo) write_line(m + "\n");
}
void log_debug(const std::string& m) {
  if (log_level() >= LogLevel::kDebug) write_line(m + "\n");
}

Progress::Progress(std::string label, int64_t total)
    : label_(std::move(label)), total_(total), start_(now_seconds()), terminal_(isatty(STDERR_FILENO) != 0) {}

Progress::~Progress() {
  if (drawn_ && terminal_) write_line("\r\033[K");
}

void Progress::update(int64_t done, const std::string& note) {
  if (log_level() < LogLevel::kInfo) return;
  const double now = now_seconds();
  const double interval = terminal_ ? 0.1 : 5.0;  // seconds between two lines
  if (now - (last_ > 0 ? last_ : (terminal_ ? 0.0 : start_)) < interval && !(terminal_ && done == total_)) return;
  last_ = now;
  const double elapsed = now - start_;
  std::string line = fmt::format("{} {}", label_, done);
  if (total_ > 0) {
    line += fmt::format("/{}", total_);
    if (done > 0)
      line += fmt::format("  {:.0f} s, {:.0f} s left", elapsed,
                          elapsed / static_cast<double>(done) * static_cast<double>(total_ - done));
  }
  if (!note.empty()) line += "  " + note;
  drawn_ = true;
  // A line that wraps could not be drawn over.
  if (const size_t columns = terminal_ ? terminal_columns(STDERR_FILENO) : 0; columns > 0)
    line.resize(first_columns(line, columns).size());
  write_line(terminal_ ? "\r\033[K" + line : line + "\n");
}

}  // namespace vqkv
