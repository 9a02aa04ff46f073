// A kernel whose requests to memory can be counted by hand.
#pragma once

namespace vqkv::device {

// One warp reads 4 and 8 bytes a lane from shared memory, `shared_stride` floats or pairs apart, and 4 bytes from
// global memory, `global_stride` floats apart.
void run_strides(int shared_stride, int global_stride);

}  // namespace vqkv::device
