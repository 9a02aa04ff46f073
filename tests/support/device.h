// Tests of kernels, the same for a device and for the emulated one.
#pragma once
#include <cstdint>
#include <functional>
#include <optional>

namespace vqkv {

// On the emulated device in four orders of threads and blocks, each with its name in messages; on a device once.
void in_every_order(const std::function<void()>& test);

// Without judging accesses, where that would take too much time and memory.
void unwatched(const std::function<void()>& test);

// Passes over the banks of shared memory, and the fewest that could be, of what `test` launches. None where
// nobody counts: on a device, and where a sanitizer watches the kernels.
struct SharedTraffic {
  uint64_t read = 0, fewest_read = 0, written = 0, fewest_written = 0;
};
std::optional<SharedTraffic> shared_traffic_of(const std::function<void()>& test);

}  // namespace vqkv
