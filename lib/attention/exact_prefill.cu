#include "attention/exact_prefill.h"
#include "device/pairs.h"

namespace vqkv {
namespace {

// A row is one query head of one token: all heads of a group go by the same keys and values, whatever its size. A warp
// has two tiles of 16 rows, so that what it reads of keys and values serves twice.
constexpr int kWarps = 4, kRowTiles = 2, kWarpRows = kRowTiles * 16, kRows = kWarps * kWarpRows;
constexpr int kStages = 2, kTokens = 32;  // a step; a stage is a page
static_assert(kDevicePageTokens % kTokens == 0);

template <int kDim>
struct Tiles {
  static constexpr int kPadded = (kDim + 15) / 16 * 16;  // a product takes 16 channels
  static constexpr int kChunks = kDim / 8, kPaddedChunks = kPadded / 8;
  // Of a row in shared memory: an odd count of 16 bytes, so that eight rows of a matrix lie in different banks.
  static constexpr int kStride = kPadded + 8;
  static constexpr int kCopies = kDevicePageTokens * kPaddedChunks / (kWarps * 32);  // of a thread, of keys and values
  static_assert(kDevicePageTokens * kPaddedChunks % (kWarps * 32) == 0);
  static constexpr size_t kBytes = sizeof(uint16_t) * kStride * (kRows + kStages * 2 * kDevicePageTokens);
};

struct Bf16 {
  __device__ static uint32_t pair(float low, float high) { return device::bf16_pair(low, high); }
  __device__ static void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    device::multiply_bf16(c, a, b);
  }
};
struct F16 {
  __device__ static uint32_t pair(float low, float high) { return device::f16_pair(low, high); }
  __device__ static void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    device::multiply_f16(c, a, b);
  }
};

template <int kDim, class Numbers>
__global__ void __launch_bounds__(kWarps * 32) exact_prefill_kernel(ExactPrefill p) {
  using T = Tiles<kDim>;
  device::Shared shared;
  uint16_t* queries = shared.take<uint16_t>(kRows * T::kStride);
  uint16_t* stages = shared.take<uint16_t>(kStages * 2 * kDevicePageTokens * T::kStride);  // stage, K | V, row

  const int head = static_cast<int>(blockIdx.y);
  const int4 of = device::load(reinterpret_cast<const int4*>(p.of_block + blockIdx.z));
  const int first_row = of.x, tokens = of.y, held = of.z;
  const int32_t* pages = p.page_table + of.w * p.most_pages;
  // The last rows see most: they go first.
  const int first = static_cast<int>(gridDim.x - 1 - blockIdx.x) * kRows, rows = tokens * p.group;
  if (first >= rows) return;
  const int warp = __shfl_sync(device::kAllLanes, static_cast<int>(threadIdx.x >> 5), 0);
  const int lane = static_cast<int>(threadIdx.x & 31), matrix = lane / 8, matrix_row = lane % 8;
  const int end = held + (min(first + kRows, rows) - 1) / p.group + 1;  // tokens that some row sees

  const auto fetch = [&](int page, int stage) {
    if (page * kDevicePageTokens < end) {
      const size_t from = (static_cast<size_t>(pages[page]) * p.kv_heads + head) * kDevicePageTokens * kDim;
      uint16_t* to = stages + stage * 2 * kDevicePageTokens * T::kStride;
#pragma unroll 4
      for (int j = 0; j < T::kCopies; ++j) {
        const int i = j * kWarps * 32 + static_cast<int>(threadIdx.x);
        const int row = i / T::kPaddedChunks, chunk = i % T::kPaddedChunks;
        // Zeros elsewhere: a weight of 0 makes nothing of a NaN.
        const bool there = page * kDevicePageTokens + row < end && chunk < T::kChunks;
        const size_t at = from + static_cast<size_t>(row * kDim + chunk * 8);
        device::copy_async16(to + row * T::kStride + chunk * 8, p.keys + at, there);
        device::copy_async16(to + (kDevicePageTokens + row) * T::kStride + chunk * 8, p.values + at, there);
      }
    }
    device::commit_copies();
  };
  fetch(0, 0);

  for (int i = static_cast<int>(threadIdx.x); i < kRows * T::kPaddedChunks; i += kWarps * 32) {
    const int row = i / T::kPaddedChunks, chunk = i % T::kPaddedChunks, at = first + row;
    uint4 rounded = make_uint4(0, 0, 0, 0);
    if (at < rows && chunk < T::kChunks) {
      const int query = ((first_row + at / p.group) * p.kv_heads + head) * p.group + at % p.group;
      const float4* from = reinterpret_cast<const float4*>(p.queries + static_cast<size_t>(query) * kDim + chunk * 8);
      const float4 low = device::load(from), high = device::load(from + 1);
      rounded = make_uint4(Numbers::pair(low.x, low.y), Numbers::pair(low.z, low.w), Numbers::pair(high.x, high.y),
                           Numbers::pair(high.z, high.w));
    }
    device::store(reinterpret_cast<uint4*>(queries + row * T::kStride + chunk * 8), rounded);
  }

  // Rows beyond the block's see what its last one sees, and are not written.
  const int warp_first = first + warp * kWarpRows;
  const auto position = [&](int row) { return held + min(row, rows - 1) / p.group; };
  const int warp_from = position(warp_first), warp_last = position(warp_first + kWarpRows - 1);
  int seen[kRowTiles][2];  // the last token that each of the lane's rows sees
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) seen[m][r] = position(warp_first + m * 16 + r * 8 + lane / 4);

  float most[kRowTiles][2], sum[kRowTiles][2], out[kRowTiles][T::kPaddedChunks][4] = {};
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) most[m][r] = -INFINITY, sum[m][r] = 0;
  const uint16_t* query_row = queries + (warp * kWarpRows + matrix % 2 * 8 + matrix_row) * T::kStride + matrix / 2 * 8;

  for (int page = 0, stage = 0; page * kDevicePageTokens < end; ++page, stage ^= 1) {
    fetch(page + 1, stage ^ 1);
    device::wait_copies<1>();
    __syncthreads();  // the other threads' copies and queries
    const uint16_t* keys = stages + stage * 2 * kDevicePageTokens * T::kStride;
    const uint16_t* values = keys + kDevicePageTokens * T::kStride;
#pragma unroll 1
    for (int step = 0; step < kDevicePageTokens; step += kTokens) {
      const int token = page * kDevicePageTokens + step;
      if (warp_first >= rows || token > warp_last) break;
      float score[kRowTiles][kTokens / 8][4] = {};
#pragma unroll 2  // more would not fit the registers at 128 channels
      for (int c = 0; c < T::kPadded / 16; ++c) {
        uint32_t q[kRowTiles][4];
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) device::load_matrices(q[m], query_row + m * 16 * T::kStride + c * 16);
#pragma unroll
        for (int n = 0; n < kTokens / 16; ++n) {
          uint32_t k[4];  // of 8 tokens and the next 8, channels and the next 8
          device::load_matrices(
              k, keys + (step + n * 16 + matrix / 2 * 8 + matrix_row) * T::kStride + c * 16 + matrix % 2 * 8);
          const uint32_t low[2] = {k[0], k[1]}, high[2] = {k[2], k[3]};
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m) {
            Numbers::multiply(score[m][2 * n], q[m], low);
            Numbers::multiply(score[m][2 * n + 1], q[m], high);
          }
        }
      }
      if (token + kTokens - 1 > warp_from) {
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
          for (int n = 0; n < kTokens / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
              if (token + n * 8 + lane % 4 * 2 + i % 2 > seen[m][i / 2]) score[m][n][i] = -INFINITY;
      }
      // The first tokens are seen by every row: `most` is finite from there on.
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float now = most[m][r];
#pragma unroll
          for (int n = 0; n < kTokens / 8; ++n) now = fmaxf(now, fmaxf(score[m][n][2 * r], score[m][n][2 * r + 1]));
          now = fmaxf(now, __shfl_xor_sync(device::kAllLanes, now, 1));
          now = fmaxf(now, __shfl_xor_sync(device::kAllLanes, now, 2));
          const float fade = device::exp2_fast(most[m][r] - now);
          most[m][r] = now;
          sum[m][r] *= fade;
#pragma unroll
          for (int n = 0; n < kTokens / 8; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              float& s = score[m][n][2 * r + i];
              s = device::exp2_fast(s - now);
              sum[m][r] += s;
            }
#pragma unroll
          for (int c = 0; c < T::kPaddedChunks; ++c) out[m][c][2 * r] *= fade, out[m][c][2 * r + 1] *= fade;
        }
#pragma unroll
      for (int n = 0; n < kTokens / 16; ++n) {
        uint32_t weight[kRowTiles][4];  // as a lane holds sums of a product, it holds what the next one multiplies
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float(&s)[4] = score[m][2 * n + i / 2];
            weight[m][i] = Numbers::pair(s[i % 2 * 2], s[i % 2 * 2 + 1]);
          }
#pragma unroll
        for (int c = 0; c < T::kPadded / 16; ++c) {
          uint32_t v[4];  // of 8 tokens and the next 8, 8 channels; then of the next 8 channels
          device::load_transposes(
              v, values + (step + n * 16 + matrix % 2 * 8 + matrix_row) * T::kStride + c * 16 + matrix / 2 * 8);
          const uint32_t low[2] = {v[0], v[1]}, high[2] = {v[2], v[3]};
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m) {
            Numbers::multiply(out[m][2 * c], weight[m], low);
            Numbers::multiply(out[m][2 * c + 1], weight[m], high);
          }
        }
      }
    }
    __syncthreads();  // this stage is read before it is filled again
  }
  device::wait_copies<0>();

#pragma unroll
  for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[m][r] += __shfl_xor_sync(device::kAllLanes, sum[m][r], 1);
      sum[m][r] += __shfl_xor_sync(device::kAllLanes, sum[m][r], 2);
      const int at = warp_first + m * 16 + r * 8 + lane / 4;
      if (at >= rows) continue;
      const int query = ((first_row + at / p.group) * p.kv_heads + head) * p.group + at % p.group;
      float* to = p.out + static_cast<size_t>(query) * kDim + lane % 4 * 2;
#pragma unroll
      for (int c = 0; c < T::kChunks; ++c)
        device::store(reinterpret_cast<float2*>(to + c * 8),
                      make_float2(out[m][c][2 * r] / sum[m][r], out[m][c][2 * r + 1] / sum[m][r]));
    }
}

}  // namespace

void exact_prefill(const ExactPrefill& call) {
  const dim3 grid(static_cast<unsigned>((call.longest * call.group + kRows - 1) / kRows),
                  static_cast<unsigned>(call.kv_heads), static_cast<unsigned>(call.blocks));
  at_head_dim(call.head_dim, [&](auto dim) {
    const device::Config config{grid, dim3(kWarps * 32), Tiles<dim>::kBytes};
    if (call.f16)
      device::launch(exact_prefill_kernel<dim, F16>, config, call);
    else
      device::launch(exact_prefill_kernel<dim, Bf16>, config, call);
  });
}

}  // namespace vqkv
