#include "device/traffic.h"

#include "device/device.h"
#include "device/runtime.h"

namespace vqkv::device {
namespace {

constexpr int kMostStride = 32, kFloats = 32 * kMostStride;

__global__ void strides_kernel(const float* in, float* out, int shared_stride, int global_stride) {
  Shared shared;
  float* room = shared.take<float>(2 * kFloats);
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 2 * kFloats; i += 32) room[i] = 1.0f;
  __syncthreads();
  const float one = load(room + lane * shared_stride);
  const float2 two = load(reinterpret_cast<const float2*>(room) + lane * shared_stride);
  out[lane] = one + two.x + two.y + load(in + lane * global_stride);
}

}  // namespace

void run_strides(int shared_stride, int global_stride) {
  Buffer<float> in(kFloats, "in"), out(32, "out");
  in.zero();
  launch(strides_kernel, {dim3(1), dim3(32), 2 * kFloats * sizeof(float)}, static_cast<const float*>(in.data()),
         out.data(), shared_stride, global_stride);
  synchronize();
}

}  // namespace vqkv::device
