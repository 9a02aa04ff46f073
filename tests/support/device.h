// Tests of kernels, the same for a device and for the emulated one.
#pragma once
#include <functional>

namespace vqkv {

// On the emulated device in four orders of threads and blocks, each with its name in messages; on a device once.
void in_every_order(const std::function<void()>& test);

// Without judging accesses, where that would take too much time and memory.
void unwatched(const std::function<void()>& test);

}  // namespace vqkv
