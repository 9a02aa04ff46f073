// Bytes that operator new holds, for tests of memory in the binary of tests/attention (attention/allocations.cpp).
#pragma once
#include <cstdint>

namespace vqkv::test {

// Sanitizers bring their own operator new: then nothing is counted.
bool counts_allocations();
int64_t live_bytes();
// The most since the last call of restart_peak.
int64_t peak_bytes();
void restart_peak();

}  // namespace vqkv::test
