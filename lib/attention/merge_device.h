// Softmax over parts of a cache, on a device. A part's state is the largest score m, the sum of 2^(s - m), and the sum
// of 2^(s - m) v. Scores are in bits: times log2(e).
#pragma once
#include "attention/split_states.h"
#include "device/device.h"

namespace vqkv {
namespace {

// A part without a token has m = -inf and weighs nothing.
__device__ __forceinline__ float part_weight(float m, float most) {
  return m == -INFINITY ? 0.0f : device::exp2_fast(m - most);
}

// The states of a block's warps, in shared memory, as one: out_of (warps, kGroup, kDim), state_of (warps, kGroup, 2).
// Writes the split's state, or where there is one split alone the result, (group, head_dim) at `result`, of `heads`
// heads.
template <int kWarps, int kGroup, int kDim>
__device__ void merge_warps(const float* out_of, const float* state_of, const SplitStates& to, int row, int split,
                            int splits, int heads, float* result) {
  for (int i = static_cast<int>(threadIdx.x); i < kGroup * kDim; i += kWarps * 32) {
    const int g = i / kDim;
    float most = -INFINITY, sum = 0, out = 0;
    for (int w = 0; w < kWarps; ++w) most = fmaxf(most, state_of[(w * kGroup + g) * 2]);
    for (int w = 0; w < kWarps; ++w) {
      const float weight = part_weight(state_of[(w * kGroup + g) * 2], most);
      sum = fmaf(weight, state_of[(w * kGroup + g) * 2 + 1], sum);
      out = fmaf(weight, out_of[w * kGroup * kDim + i], out);
    }
    if (splits == 1) {
      if (g < heads) result[i] = out / sum;
      continue;
    }
    const int at = row * splits + split;
    to.out[at * kGroup * kDim + i] = out;
    if (i % kDim == 0) {
      to.state[(at * kGroup + g) * 2] = most;
      to.state[(at * kGroup + g) * 2 + 1] = sum;
    }
  }
}

// The block that arrives last of a row's merges its splits. `last`: room of the block. All threads call it.
template <int kThreads, int kGroup, int kDim>
__device__ void merge_splits(const SplitStates& of, int row, int splits, unsigned* last, int heads, float* result) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    *last = atomicAdd(of.arrived + row, 1u) == static_cast<unsigned>(splits) - 1;
  }
  __syncthreads();
  if (!*last) return;
  __threadfence();
  for (int i = static_cast<int>(threadIdx.x); i < heads * kDim; i += kThreads) {
    const int g = i / kDim;
    float most = -INFINITY, sum = 0, out = 0;
    for (int s = 0; s < splits; ++s) most = fmaxf(most, of.state[((row * splits + s) * kGroup + g) * 2]);
    for (int s = 0; s < splits; ++s) {
      const float* state = of.state + ((row * splits + s) * kGroup + g) * 2;
      const float weight = part_weight(state[0], most);
      sum = fmaf(weight, state[1], sum);
      out = fmaf(weight, of.out[(row * splits + s) * kGroup * kDim + i], out);
    }
    result[i] = out / sum;
  }
  if (threadIdx.x == 0) of.arrived[row] = 0;
}

}  // namespace
}  // namespace vqkv
