#include <string>

#include "attention/merge_device.h"
#include "attention/pq_decode_cuda.h"
#include "core/error.h"
#include "device/device.h"

namespace vqkv {
namespace {

// Four query heads are worked on, whatever the group: half a table entry each in a table of 64 KiB.
constexpr int kHeads = 4, kWarps = 8, kThreads = kWarps * 32, kTileBytes = kPqTile * kPqBooks;

// Two halves (low, high).
__device__ __forceinline__ uint32_t halves(float low, float high) {
  return device::bits_as<uint32_t>(__floats2half2_rn(low, high));
}

// Scores of every codeword with four heads' parts of the query, (slot, head) in half, by tensor cores: A holds 4 heads
// x 4 books, a block a book over their 16 channels; B 8 codewords of those books.
__device__ void fill_table(const PqDecode& p, int row, int head, uint32_t* table, int warp, int lane) {
  const int m = lane / 4, pair = lane % 4 * 2;  // A's row: head m / 4 of 2 or m / 4 + 2, book m % 4
  const uint16_t* books = p.key_books + static_cast<size_t>(head) * kPqBooks * kPqEntries * kPqWidth;
  auto* half_table = reinterpret_cast<__half*>(table);
  constexpr int kFours = kPqBooks / 4;
  const int first = warp % kFours * 4, share = kPqEntries * kFours / kWarps, from = warp / kFours * share;
  uint32_t a[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int r = m + i % 2 * 8, k = pair + i / 2 * 8, g = r / 4;
    a[i] = 0;
    if (k / 4 == r % 4 && g < p.group) {
      const float2 q = device::load(reinterpret_cast<const float2*>(p.queries + (row * p.group + g) * kPqDim +
                                                                    (first + r % 4) * kPqWidth + k % 4));
      a[i] = halves(q.x, q.y);
    }
  }
  for (int s = from; s < from + share; s += 8) {
    uint32_t b[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int k = pair + i * 8;
      b[i] = device::load(
          reinterpret_cast<const uint32_t*>(books + (((first + k / 4) * kPqEntries + s + m) * kPqWidth + k % 4)));
    }
    float c[4] = {0, 0, 0, 0};
    device::multiply_f16(c, a, b);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = m + i / 2 * 8;
      half_table[pq_slot(first + r % 4, s + pair + i % 2) * kHeads + r / 4] = __float2half_rn(c[i]);
    }
  }
}

// Code t of 16 in four words: one permute, where a shift and a mask are two instructions.
__device__ __forceinline__ unsigned code_of(const uint4& codes, int t) {
  const unsigned word = t < 4 ? codes.x : t < 8 ? codes.y : t < 12 ? codes.z : codes.w;
  return __byte_perm(word, 0, 0x4440u + static_cast<unsigned>(t % 4));
}

// A lane is a book: it looks up what its book adds to the scores of 32 tokens and four heads. Tensor cores sum over the
// lanes: four neighbours, with heads of four tokens side by side in C; then, of C turned, the eight fours. An entry's
// two pairs of heads lie in A's upper and lower rows, as the load left them in registers. scores: lane l holds, for
// heads l / 4 % 2 (0, 1) and 2 more (2, 3), tokens 8 (l % 4) + l / 8 (0, 2) and 4 further (1, 3).
__device__ __forceinline__ void score_tile(const uint2* mine, const uint4 (&codes)[2], const uint32_t (&pick)[2][2],
                                           const uint32_t (&gather)[4][2], float (&scores)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) scores[i] = 0;
#pragma unroll
  for (int two = 0; two < 4; ++two) {
    uint32_t turned[4];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int first = (two * 2 + j) * 4;  // four tokens
      uint2 entry[4];
#pragma unroll
      for (int t = 0; t < 4; ++t) entry[t] = device::load(mine + code_of(codes[first / 16], first % 16 + t) * 16);
      float c[4] = {0, 0, 0, 0};
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const uint32_t a[4] = {entry[2 * t].x, entry[2 * t].y, entry[2 * t + 1].x, entry[2 * t + 1].y};
        device::multiply_f16(c, a, pick[t]);
      }
      turned[2 * j] = device::transpose8(halves(c[0], c[1]));
      turned[2 * j + 1] = device::transpose8(halves(c[2], c[3]));
    }
    device::multiply_f16(scores, turned, gather[two]);
  }
}

__global__ void __launch_bounds__(kThreads) pq_decode_kernel(PqDecode p, SplitStates states) {
  device::Shared shared;
  uint32_t* table = shared.take<uint32_t>(kPqBooks * kPqEntries * 2);   // (slot): four heads in half
  uint32_t* values = shared.take<uint32_t>(kPqBooks * kPqEntries * 2);  // (slot): four channels in half
  auto* weights = shared.take<uint2>(kWarps * kPqTile);                 // (warp, token): four heads in half
  float* fades = shared.take<float>(kWarps * kHeads);
  float* out_of = shared.take<float>(kWarps * kHeads * kPqDim);
  float* state_of = shared.take<float>(kWarps * kHeads * 2);
  unsigned* last = shared.take<unsigned>(1);

  const int warp = __shfl_sync(device::kAllLanes, static_cast<int>(threadIdx.x >> 5), 0);
  const int lane = static_cast<int>(threadIdx.x & 31);
  const int splits = static_cast<int>(gridDim.x), split = static_cast<int>(blockIdx.x);
  const int head = static_cast<int>(blockIdx.y), sequence = static_cast<int>(blockIdx.z);
  const int row = sequence * p.kv_heads + head, length = p.lengths[sequence];
  const int tiles = (length + kPqTile - 1) / kPqTile, each = (tiles + splits - 1) / splits;
  const int end = min(tiles, (split + 1) * each);

  fill_table(p, row, head, table, warp, lane);
  const auto* books =
      reinterpret_cast<const uint4*>(p.value_books) + static_cast<size_t>(head) * kPqBooks * kPqEntries / 2;
  for (int i = static_cast<int>(threadIdx.x); i < kPqBooks * kPqEntries / 2; i += kThreads)
    device::copy_async16(reinterpret_cast<uint4*>(values) + i, books + i);
  device::commit_copies();
  device::wait_copies<0>();
  __syncthreads();

  // Which of a lane's numbers go to which column of C: a pair of heads of four tokens, two at a time.
  const int column = lane / 4, pair = lane % 4;
  uint32_t pick[2][2], gather[4][2];
#pragma unroll
  for (int t = 0; t < 2; ++t)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int g = column - 4 * t - 2 * i;
      pick[t][i] = halves(g == 0 ? 1.0f : 0.0f, g == 1 ? 1.0f : 0.0f);
    }
#pragma unroll
  for (int two = 0; two < 4; ++two)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float one = column == two * 2 + i ? 1.0f : 0.0f;
      gather[two][i] = halves(one, one);
    }

  const auto* my_scores = reinterpret_cast<const uint2*>(table) + pq_slot(lane, 0);
  const auto* my_values = reinterpret_cast<const uint2*>(values) + pq_slot(lane, 0);
  uint2* my_weights = weights + warp * kPqTile;
  const int my_head = lane / 4 % 2, my_token = 8 * pair + lane / 8;
  float most[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};  // of my_head and my_head + 2
  float out[kHeads][kPqWidth] = {};

  const auto codes_of = [&](const uint8_t* all, int tile, uint4(&codes)[2]) {
    if (tile >= end) return;
    const size_t at = static_cast<size_t>(p.tile_table[sequence * p.most_tiles + tile]) * p.kv_heads + head;
    const auto* from = reinterpret_cast<const uint4*>(all + at * kTileBytes) + lane;
    codes[0] = device::load(from);
    codes[1] = device::load(from + kPqBooks);
  };

  int tile = split * each + warp;
  uint4 keys[2] = {}, next_keys[2] = {}, coded[2] = {}, next_coded[2] = {};
  codes_of(p.key_codes, tile, keys);
  codes_of(p.value_codes, tile, coded);
  for (; tile < end; tile += kWarps) {
    codes_of(p.key_codes, tile + kWarps, next_keys);
    codes_of(p.value_codes, tile + kWarps, next_coded);
    float scores[4];
    score_tile(my_scores, keys, pick, gather, scores);
    if ((tile + 1) * kPqTile > length) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (tile * kPqTile + my_token + i % 2 * 4 >= length) scores[i] = -INFINITY;
    }
    auto* my_half = reinterpret_cast<__half*>(my_weights);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float now = fmaxf(fmaxf(scores[2 * h], scores[2 * h + 1]), most[h]);
#pragma unroll
      for (const int step : {1, 2, 8, 16}) now = fmaxf(now, __shfl_xor_sync(device::kAllLanes, now, step));
      const float fade = device::exp2_fast(most[h] - now);
      most[h] = now;
      sum[h] *= fade;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float weight = device::exp2_fast(scores[2 * h + i] - now);
        sum[h] += weight;
        my_half[(my_token + 4 * i) * kHeads + my_head + 2 * h] = __float2half_rn(weight);
      }
      if (pair == 0 && lane < 8) fades[warp * kHeads + my_head + 2 * h] = fade;
    }
    __syncwarp();

    __half2 added[kHeads][kPqWidth / 2];
#pragma unroll
    for (int g = 0; g < kHeads; ++g) added[g][0] = added[g][1] = __floats2half2_rn(0.0f, 0.0f);
#pragma unroll
    for (int t = 0; t < kPqTile; t += 2) {
      const uint4 both = device::load(reinterpret_cast<const uint4*>(my_weights + t));
      const uint32_t of[2][2] = {{both.x, both.y}, {both.z, both.w}};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint2 v = device::load(my_values + code_of(coded[(t + i) / 16], (t + i) % 16) * 16);
        const auto low = device::bits_as<__half2>(v.x), high = device::bits_as<__half2>(v.y);
#pragma unroll
        for (int g = 0; g < kHeads; ++g) {
          const auto two = device::bits_as<__half2>(of[i][g / 2]);
          const __half2 weight = g % 2 == 0 ? __low2half2(two) : __high2half2(two);
          added[g][0] = __hfma2(weight, low, added[g][0]);
          added[g][1] = __hfma2(weight, high, added[g][1]);
        }
      }
    }
    const float4 all_fades = device::load(reinterpret_cast<const float4*>(fades + warp * kHeads));
    const float fade_of[kHeads] = {all_fades.x, all_fades.y, all_fades.z, all_fades.w};
#pragma unroll
    for (int g = 0; g < kHeads; ++g)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 two = __half22float2(added[g][i]);
        out[g][2 * i] = fmaf(out[g][2 * i], fade_of[g], two.x);
        out[g][2 * i + 1] = fmaf(out[g][2 * i + 1], fade_of[g], two.y);
      }
    __syncwarp();  // weights are read before they are written again
#pragma unroll
    for (int i = 0; i < 2; ++i) keys[i] = next_keys[i], coded[i] = next_coded[i];
  }

  // Other lanes of a head hold other tokens' weights.
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (const int step : {1, 2, 8, 16}) sum[h] += __shfl_xor_sync(device::kAllLanes, sum[h], step);
#pragma unroll
  for (int g = 0; g < kHeads; ++g)
    device::store(reinterpret_cast<float4*>(out_of + (warp * kHeads + g) * kPqDim) + lane,
                  make_float4(out[g][0], out[g][1], out[g][2], out[g][3]));
  if (pair == 0 && lane < 8)
    for (int h = 0; h < 2; ++h) {
      state_of[(warp * kHeads + my_head + 2 * h) * 2] = most[h];
      state_of[(warp * kHeads + my_head + 2 * h) * 2 + 1] = sum[h];
    }
  __syncthreads();
  merge_warps<kWarps, kHeads, kPqDim>(out_of, state_of, states, row, split, splits, p.group,
                                      p.out + row * p.group * kPqDim);
  if (splits > 1)
    merge_splits<kThreads, kHeads, kPqDim>(states, row, splits, last, p.group, p.out + row * p.group * kPqDim);
}

}  // namespace

PqDecoder::PqDecoder(int sequences, int kv_heads, int group, int splits) : splits_(splits) {
  if (group > kHeads)
    fail_usage("attention on product codes on a device: " + std::to_string(group) +
               " query heads a KV head; kernels are compiled for up to " + std::to_string(kHeads));
  VQKV_CHECK(sequences >= 1 && kv_heads >= 1 && group >= 1 && splits >= 1);
  if (splits == 1) return;
  const size_t rows = static_cast<size_t>(sequences) * static_cast<size_t>(kv_heads);
  const size_t parts = rows * static_cast<size_t>(splits) * kHeads;
  out_ = device::Buffer<float>(parts * kPqDim, "outputs of splits");
  state_ = device::Buffer<float>(parts * 2, "states of splits");
  arrived_ = device::Buffer<unsigned>(rows, "arrivals");
  arrived_.zero();
}

void PqDecoder::operator()(const PqDecode& call) {
  constexpr size_t kBytes = 2 * sizeof(uint2) * kPqBooks * kPqEntries + sizeof(uint2) * kWarps * kPqTile +
                            sizeof(float) * kWarps * kHeads * (1 + kPqDim + 2) + 16;
  const dim3 grid(static_cast<unsigned>(splits_), static_cast<unsigned>(call.kv_heads),
                  static_cast<unsigned>(call.sequences));
  device::launch(pq_decode_kernel, {grid, dim3(kThreads), kBytes}, call,
                 SplitStates{out_.data(), state_.data(), arrived_.data()});
}

}  // namespace vqkv
