// Memory that this machine, or the container that the process runs in, has to give.
#pragma once
#include <cstdint>
#include <filesystem>
#include <string>

namespace vqkv {

// What processes may still take without pushing each other out: available memory and free swap, of the machine
// (/proc/meminfo) or of the control groups around this process (v1 and v2), whichever is least. INT64_MAX where the
// system doesn't say. root: where /proc and /sys are.
int64_t available_memory_bytes(const std::filesystem::path& root = "/");
// kUsage, led by `what`, when that is less than `bytes`.
void require_memory(const std::string& what, int64_t bytes);

}  // namespace vqkv
