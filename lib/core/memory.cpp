#include "core/memory.h"

#include <fmt/format.h>

#include <fstream>
#include <limits>

#include "core/error.h"

namespace vqkv {

int64_t available_memory_bytes() {
  std::ifstream in("/proc/meminfo");
  int64_t free = 0;
  bool told = false;
  std::string name, unit;
  for (int64_t kib = 0; in >> name >> kib; std::getline(in, unit)) {
    if (name != "MemAvailable:" && name != "SwapFree:") continue;
    free += kib * 1024;
    told = told || name == "MemAvailable:";
  }
  return told ? free : std::numeric_limits<int64_t>::max();
}

void require_memory(const std::string& what, int64_t bytes) {
  if (const int64_t free = available_memory_bytes(); free < bytes)
    fail_usage(fmt::format("{}: {} bytes of memory needed, {} available", what, bytes, free));
}

}  // namespace vqkv
