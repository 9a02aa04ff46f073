// Log lines and the progress line go to stderr; stdout belongs to results.
#pragma once
#include <cstdint>
#include <string>

namespace vqkv {

enum class LogLevel { kQuiet, kWarning, kInfo, kDebug };
void set_log_level(LogLevel level);
LogLevel log_level();
void log_warning(const std::string& message);
void log_info(const std::string& message);
void log_debug(const std::string& message);

// One redrawn line on a terminal, a plain line every few seconds otherwise, nothing when quiet.
class Progress {
 public:
  Progress(std::string label, int64_t total);  // total <= 0: unknown
  ~Progress();                                 // clears the redrawn line
  void update(int64_t done, const std::string& note = "");

 private:
  std::string label_;
  int64_t total_;
  double start_, last_ = 0;
  bool terminal_, drawn_ = false;
};

}  // namespace vqkv
