#include "core/memory.h"

#include <fstream>
#include <limits>

#include "core/error.h"
#include "support/catch.h"
#include "support/test_folder.h"

using namespace vqkv;

namespace {

constexpr int64_t kMiB = int64_t{1} << 20;

// A root whose machine has 100 MiB available and 10 MiB of swap free.
struct Machine {
  TestFolder root;
  Machine() {
    file("proc/meminfo", "MemTotal:  204800 kB\nMemAvailable:  102400 kB\nSwapFree:  10240 kB\nHugePages_Total:  0\n");
  }
  void file(const std::string& path, const std::string& text) const {
    const std::filesystem::path at = root.path / path;
    std::filesystem::create_directories(at.parent_path());
    std::ofstream(at) << text;
  }
  void file(const std::string& path, int64_t number) const { file(path, std::to_string(number) + "\n"); }
  int64_t left() const { return available_memory_bytes(root.path); }
};

}  // namespace

TEST_CASE("available memory is the machine's where no control group limits it") {
  const Machine m;
  CHECK(m.left() == 110 * kMiB);
  m.file("proc/self/cgroup", "0::/\n");
  CHECK(m.left() == 110 * kMiB);
  m.file("sys/fs/cgroup/memory.max", "max\n");
  CHECK(m.left() == 110 * kMiB);
  const TestFolder nothing;
  CHECK(available_memory_bytes(nothing.path) == std::numeric_limits<int64_t>::max());
  CHECK(available_memory_bytes() > 0);
}

TEST_CASE("available memory is what the narrowest control group leaves, up to the root") {
  const Machine m;
  m.file("proc/self/cgroup", "0::/a/b\n");
  m.file("sys/fs/cgroup/a/b/memory.max", "max\n");
  m.file("sys/fs/cgroup/a/memory.max", 60 * kMiB);
  m.file("sys/fs/cgroup/a/memory.current", 25 * kMiB);
  CHECK(m.left() == 45 * kMiB);  // 35 and the swap of the machine
  // Pages of files are given up; swap may be limited, too.
  m.file("sys/fs/cgroup/a/memory.stat", "anon 1048576\nfile 9437184\ninactive_file 3145728\nactive_file 2097152\n");
  CHECK(m.left() == 50 * kMiB);
  m.file("sys/fs/cgroup/a/b/memory.swap.max", 4 * kMiB);
  m.file("sys/fs/cgroup/a/b/memory.swap.current", 1 * kMiB);
  CHECK(m.left() == 43 * kMiB);
  m.file("sys/fs/cgroup/a/b/memory.max", 20 * kMiB);
  m.file("sys/fs/cgroup/a/b/memory.current", 21 * kMiB);  // a limit that was lowered meanwhile
  CHECK(m.left() == 3 * kMiB);
}

TEST_CASE("available memory heeds the first version of control groups, and a container's root under another name") {
  const Machine m;
  m.file("proc/self/cgroup", "9:name=systemd:/x\n4:hugetlb,memory:/docker/f00\n1:cpu:/x\n0::/\n");
  m.file("sys/fs/cgroup/memory/memory.limit_in_bytes", 64 * kMiB);
  m.file("sys/fs/cgroup/memory/memory.usage_in_bytes", 32 * kMiB);
  m.file("sys/fs/cgroup/memory/memory.stat",
         "inactive_file 7\ntotal_inactive_file 1048576\ntotal_active_file 1048576\n");
  CHECK(m.left() == 44 * kMiB);
  m.file("sys/fs/cgroup/memory/memory.memsw.limit_in_bytes", 64 * kMiB);
  m.file("sys/fs/cgroup/memory/memory.memsw.usage_in_bytes", 32 * kMiB);
  CHECK(m.left() == 34 * kMiB);
  m.file("sys/fs/cgroup/memory/docker/f00/memory.limit_in_bytes", 40 * kMiB);
  m.file("sys/fs/cgroup/memory/docker/f00/memory.usage_in_bytes", 30 * kMiB);
  m.file("sys/fs/cgroup/memory/docker/memory.limit_in_bytes", "9223372036854771712\n");
  CHECK(m.left() == 20 * kMiB);
}
