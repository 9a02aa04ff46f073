#include <algorithm>

#include "attention/exact_decode.h"
#include "attention/merge_device.h"
#include "device/device.h"

namespace vqkv {
namespace {

constexpr int kWarps = 4, kTile = 16, kStages = 3;
static_assert(kDevicePageTokens % kTile == 0);

// How a warp shares out a tile of kTile rows in chunks of 16 bytes: each token's row lies over 8 lanes, so that its
// score is a sum over few of them, and 8 lanes read 128 bytes in a row, each bank once.
template <int kDim>
struct Rows {
  static constexpr int kChunks = kDim / 8, kLanes = 8;
  static constexpr int kMine =
      (kChunks + kLanes - 1) / kLanes;             // chunks that a lane reads: mine j is j * kLanes + lane
  static constexpr int kAtOnce = 32 / kLanes;      // tokens
  static constexpr int kPasses = kTile / kAtOnce;  // over a tile
  static constexpr int kCopies = (kTile * kChunks + 31) / 32;
  static_assert(kTile % kAtOnce == 0);
  // Where kChunks is no multiple of kLanes some lanes have one less.
  __device__ static bool has(int mine, int part) { return kChunks % kLanes == 0 || mine * kLanes + part < kChunks; }
};

struct Floats {
  float v[8];
};
template <bool kF16>
__device__ __forceinline__ Floats widen(const uint4& chunk) {
  const unsigned pair[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
  Floats out;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kF16) {
      const float2 both = __half22float2(device::bits_as<__half2>(pair[i]));
      out.v[2 * i] = both.x;
      out.v[2 * i + 1] = both.y;
    } else {
      out.v[2 * i] = __uint_as_float(pair[i] << 16);
      out.v[2 * i + 1] = __uint_as_float(pair[i] & 0xffff0000u);
    }
  }
  return out;
}

template <int kDim, int kGroup, bool kF16>
__global__ void __launch_bounds__(kWarps * 32) exact_decode_kernel(ExactDecode p, int first_query, SplitStates states) {
  using R = Rows<kDim>;
  device::Shared shared;
  uint4* stages = shared.take<uint4>(kWarps * kStages * 2 * kTile * R::kChunks);  // warp, stage, K | V, row, chunk
  float* out_of = shared.take<float>(kWarps * kGroup * kDim);
  float* state_of = shared.take<float>(kWarps * kGroup * 2);
  unsigned* last = shared.take<unsigned>(1);

  const int warp = __shfl_sync(device::kAllLanes, static_cast<int>(threadIdx.x >> 5), 0);
  const int lane = static_cast<int>(threadIdx.x & 31), part = lane % R::kLanes, token_of = lane / R::kLanes;
  const int splits = static_cast<int>(gridDim.x), split = static_cast<int>(blockIdx.x);
  const int head = static_cast<int>(blockIdx.y), sequence = static_cast<int>(blockIdx.z);
  const int row = sequence * p.kv_heads + head, length = p.lengths[sequence];
  const int tiles = (length + kTile - 1) / kTile, each = (tiles + splits - 1) / splits;
  const int end = min(tiles, (split + 1) * each);
  const int32_t* pages = p.page_table + sequence * p.most_pages;
  uint4* mine = stages + warp * kStages * 2 * kTile * R::kChunks;

  const auto fetch = [&](int tile, int stage) {
    if (tile < end) {
      const int page = pages[tile * kTile / kDevicePageTokens];
      const size_t first =
          ((static_cast<size_t>(page) * p.kv_heads + head) * kDevicePageTokens + tile * kTile % kDevicePageTokens) *
          kDim;
      uint4* to = mine + stage * 2 * kTile * R::kChunks;
#pragma unroll
      for (int i = 0; i < R::kCopies; ++i) {
        const int chunk = i * 32 + lane;
        if (chunk >= kTile * R::kChunks) break;  // never where a tile is whole warps of chunks
        const bool held = tile * kTile + chunk / R::kChunks < length;
        device::copy_async16(to + chunk, p.keys + first + chunk * 8, held);
        device::copy_async16(to + kTile * R::kChunks + chunk, p.values + first + chunk * 8, held);
      }
    }
    device::commit_copies();
  };

  float query[kGroup][R::kMine * 8];
#pragma unroll
  for (int g = 0; g < kGroup; ++g)
#pragma unroll
    for (int j = 0; j < R::kMine; ++j) {
#pragma unroll
      for (int i = 0; i < 8; ++i) query[g][j * 8 + i] = 0;
      if (!R::has(j, part)) continue;
      const float* from = p.queries + (row * p.group + first_query + g) * kDim + (j * R::kLanes + part) * 8;
      const float4 low = device::load(reinterpret_cast<const float4*>(from));
      const float4 high = device::load(reinterpret_cast<const float4*>(from) + 1);
      const float all[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int i = 0; i < 8; ++i) query[g][j * 8 + i] = all[i];
    }

  float most[kGroup], sum[kGroup], out[kGroup][R::kMine * 8] = {};
#pragma unroll
  for (int g = 0; g < kGroup; ++g) most[g] = -INFINITY, sum[g] = 0;

  int tile = split * each + warp;
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) fetch(tile + s * kWarps, s);
  for (int stage = 0; tile < end; tile += kWarps, stage = stage + 1 == kStages ? 0 : stage + 1) {
    fetch(tile + (kStages - 1) * kWarps, stage == 0 ? kStages - 1 : stage - 1);
    device::wait_copies<kStages - 1>();
    __syncwarp();  // the other lanes' copies
    const uint4* keys = mine + stage * 2 * kTile * R::kChunks;
    const uint4* values = keys + kTile * R::kChunks;

    float score[R::kPasses][kGroup] = {};
#pragma unroll
    for (int n = 0; n < R::kPasses; ++n) {
      const int token = n * R::kAtOnce + token_of;
#pragma unroll
      for (int j = 0; j < R::kMine; ++j) {
        if (!R::has(j, part)) continue;
        const Floats k = widen<kF16>(device::load(keys + token * R::kChunks + j * R::kLanes + part));
#pragma unroll
        for (int g = 0; g < kGroup; ++g)
#pragma unroll
          for (int i = 0; i < 8; ++i) score[n][g] = fmaf(query[g][j * 8 + i], k.v[i], score[n][g]);
      }
#pragma unroll
      for (int g = 0; g < kGroup; ++g) {
#pragma unroll
        for (int step = R::kLanes / 2; step > 0; step /= 2)
          score[n][g] += __shfl_xor_sync(device::kAllLanes, score[n][g], step);
        if (tile * kTile + token >= length) score[n][g] = -INFINITY;
      }
    }
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      float now = most[g];
#pragma unroll
      for (int n = 0; n < R::kPasses; ++n) now = fmaxf(now, score[n][g]);
#pragma unroll
      for (int step = R::kLanes; step < 32; step *= 2) now = fmaxf(now, __shfl_xor_sync(device::kAllLanes, now, step));
      const float fade = device::exp2_fast(most[g] - now);
      most[g] = now;
      sum[g] *= fade;
#pragma unroll
      for (int n = 0; n < R::kPasses; ++n) {
        score[n][g] = device::exp2_fast(score[n][g] - now);
        sum[g] += score[n][g];
      }
#pragma unroll
      for (int i = 0; i < R::kMine * 8; ++i) out[g][i] *= fade;
    }
#pragma unroll
    for (int n = 0; n < R::kPasses; ++n)
#pragma unroll
      for (int j = 0; j < R::kMine; ++j) {
        if (!R::has(j, part)) continue;
        const Floats v =
            widen<kF16>(device::load(values + (n * R::kAtOnce + token_of) * R::kChunks + j * R::kLanes + part));
#pragma unroll
        for (int g = 0; g < kGroup; ++g)
#pragma unroll
          for (int i = 0; i < 8; ++i) out[g][j * 8 + i] = fmaf(score[n][g], v.v[i], out[g][j * 8 + i]);
      }
    __syncwarp();  // this stage is read before it is filled again
  }
  device::wait_copies<0>();

  // Lanes of other tokens hold other parts of the same channels.
#pragma unroll
  for (int g = 0; g < kGroup; ++g) {
#pragma unroll
    for (int step = R::kLanes; step < 32; step *= 2) {
      sum[g] += __shfl_xor_sync(device::kAllLanes, sum[g], step);
#pragma unroll
      for (int i = 0; i < R::kMine * 8; ++i) out[g][i] += __shfl_xor_sync(device::kAllLanes, out[g][i], step);
    }
    if (token_of > 0) continue;
#pragma unroll
    for (int i = 0; i < R::kMine * 8; ++i)
      if (R::has(i / 8, part)) out_of[(warp * kGroup + g) * kDim + (i / 8 * R::kLanes + part) * 8 + i % 8] = out[g][i];
    if (part == 0) {
      state_of[(warp * kGroup + g) * 2] = most[g];
      state_of[(warp * kGroup + g) * 2 + 1] = sum[g];
    }
  }
  __syncthreads();
  float* result = p.out + (row * p.group + first_query) * kDim;
  merge_warps<kWarps, kGroup, kDim>(out_of, state_of, states, row, split, splits, kGroup, result);
  if (splits > 1) merge_splits<kWarps * 32, kGroup, kDim>(states, row, splits, last, kGroup, result);
}

// Of the query heads [first, first + kGroup) of every group.
template <int kDim, int kGroup>
void launch_some(const ExactDecode& call, int first, int splits, const SplitStates& states) {
  constexpr size_t kBytes = sizeof(uint4) * kWarps * kStages * 2 * kTile * Rows<kDim>::kChunks +
                            sizeof(float) * kWarps * kGroup * (kDim + 2) + 16;
  const dim3 grid(static_cast<unsigned>(splits), static_cast<unsigned>(call.kv_heads),
                  static_cast<unsigned>(call.sequences));
  const device::Config config{grid, dim3(kWarps * 32), kBytes};
  if (call.f16)
    device::launch(exact_decode_kernel<kDim, kGroup, true>, config, call, first, states);
  else
    device::launch(exact_decode_kernel<kDim, kGroup, false>, config, call, first, states);
}

// Four heads at once, while their queries and outputs fit the registers of a thread; then what is left.
template <int kDim>
void launch_all(const ExactDecode& call, int splits, const SplitStates& states) {
  int first = 0;
  for (; call.group - first >= 4; first += 4) launch_some<kDim, 4>(call, first, splits, states);
  switch (call.group - first) {
    case 3:
      return launch_some<kDim, 3>(call, first, splits, states);
    case 2:
      return launch_some<kDim, 2>(call, first, splits, states);
    case 1:
      return launch_some<kDim, 1>(call, first, splits, states);
    default:
      return;
  }
}

}  // namespace

ExactDecoder::ExactDecoder(int sequences, int kv_heads, int group, int head_dim, int splits)
    : room_(sequences * kv_heads, splits, std::min(group, 4), head_dim) {
  at_head_dim(head_dim, [](auto) {});
}

void ExactDecoder::operator()(const ExactDecode& call) {
  at_head_dim(call.head_dim, [&](auto dim) { launch_all<dim>(call, room_.splits(), room_.states()); });
}

}  // namespace vqkv
