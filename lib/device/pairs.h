// Two 16-bit numbers in a word, as tensor cores and 32-bit loads take them.
#pragma once
#include "device/device.h"

namespace vqkv::device {

__device__ __forceinline__ uint32_t f16_pair(float low, float high) {
  return bits_as<uint32_t>(__floats2half2_rn(low, high));
}
__device__ __forceinline__ uint32_t bf16_pair(float low, float high) {
  return bits_as<uint32_t>(__floats2bfloat162_rn(low, high));
}

}  // namespace vqkv::device
