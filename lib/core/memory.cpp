#include "core/memory.h"

#include <fmt/format.h>

#include <algorithm>
#include <fstream>
#include <limits>
#include <set>
#include <sstream>

#include "core/error.h"

namespace vqkv {
namespace {

namespace fs = std::filesystem;
constexpr int64_t kUnlimited = std::numeric_limits<int64_t>::max();

// The number that a file holds; `none` where it holds a word ("max") or isn't there.
int64_t number_in(const fs::path& file, int64_t none) {
  std::ifstream in(file);
  int64_t value = 0;
  return in >> value ? value : none;
}

// Sum of the lines "NAME NUMBER" of a file that have one of the names; `none` without such a line.
int64_t sum_in(const fs::path& file, const std::set<std::string>& names, int64_t none) {
  std::ifstream in(file);
  int64_t sum = 0;
  bool told = false;
  std::string name, rest;
  for (int64_t value = 0; in >> name >> value; std::getline(in, rest))
    if (names.contains(name)) {
      sum += value;
      told = true;
    }
  return told ? sum : none;
}

// Pages of files count as used and are given up before a limit ends a process.
int64_t room(int64_t limit, int64_t used, int64_t reclaimable) {
  return limit == kUnlimited ? limit : std::max<int64_t>(0, limit - used + reclaimable);
}

struct Room {
  int64_t memory = kUnlimited, swap = kUnlimited, both = kUnlimited;
  void limit(const Room& by) {
    memory = std::min(memory, by.memory);
    swap = std::min(swap, by.swap);
    both = std::min(both, by.both);
  }
};

// What the control group at a folder still has (Linux, Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/memory.rst).
Room room_of_group(const fs::path& at, bool v1) {
  Room out;
  const auto number = [&](const char* file, int64_t none) { return number_in(at / file, none); };
  const int64_t files = sum_in(at / "memory.stat",
                               v1 ? std::set<std::string>{"total_active_file", "total_inactive_file"}
                                  : std::set<std::string>{"active_file", "inactive_file"},
                               0);
  if (v1) {
    out.memory = room(number("memory.limit_in_bytes", kUnlimited), number("memory.usage_in_bytes", 0), files);
    out.both = room(number("memory.memsw.limit_in_bytes", kUnlimited), number("memory.memsw.usage_in_bytes", 0), files);
  } else {
    out.memory = room(number("memory.max", kUnlimited), number("memory.current", 0), files);
    out.swap = room(number("memory.swap.max", kUnlimited), number("memory.swap.current", 0), 0);
  }
  return out;
}

}  // namespace

int64_t available_memory_bytes(const fs::path& root) {
  const fs::path meminfo = root / "proc/meminfo", groups = root / "sys/fs/cgroup";
  Room left;
  if (const int64_t kib = sum_in(meminfo, {"MemAvailable:"}, -1); kib >= 0) left.memory = kib * 1024;
  left.swap = sum_in(meminfo, {"SwapFree:"}, 0) * 1024;
  // "4:memory:/a/b", "0::/a/b". A group's limits hold for those inside it; in a container the folder may be there under
  // a shorter path than the name, and then the walk meets it at the root.
  std::ifstream in(root / "proc/self/cgroup");
  for (std::string line; std::getline(in, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    std::istringstream controllers(line.substr(first + 1, second - first - 1));
    bool v1 = false;
    for (std::string name; std::getline(controllers, name, ',');) v1 = v1 || name == "memory";
    if (!v1 && second != first + 1) continue;
    const fs::path top = v1 ? groups / "memory" : groups;
    fs::path group = fs::path(line.substr(second + 1)).lexically_normal().relative_path();
    for (;; group = group.parent_path()) {
      left.limit(room_of_group(top / group, v1));
      if (group.empty()) break;
    }
  }
  const int64_t all = left.memory > kUnlimited - left.swap ? kUnlimited : left.memory + left.swap;
  return std::min(all, left.both);
}

void require_memory(const std::string& what, int64_t bytes) {
  if (const int64_t free = available_memory_bytes(); free < bytes)
    fail_usage(fmt::format("{}: {} bytes of memory needed, {} available", what, bytes, free));
}

}  // namespace vqkv
