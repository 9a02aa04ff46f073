// Memory that this machine has to give.
#pragma once
#include <cstdint>
#include <string>

namespace vqkv {

// What processes may still take without pushing each other out: available memory and free swap. INT64_MAX where the
// system doesn't say.
int64_t available_memory_bytes();
// kUsage, led by `what`, when that is less than `bytes`.
void require_memory(const std::string& what, int64_t bytes);

}  // namespace vqkv
