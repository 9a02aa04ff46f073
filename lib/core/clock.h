#pragma once
#include <chrono>
#include <cstdint>
#include <string>

namespace vqkv {

inline double now_seconds() {  // monotonic
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}
std::string utc_now();     // "2026-01-02T03:04:05Z"
int64_t peak_rss_bytes();  // of this process, so far

class Stopwatch {
 public:
  double seconds() const { return now_seconds() - start_; }
  void restart() { start_ = now_seconds(); }

 private:
  double start_ = now_seconds();
};

}  // namespace vqkv
