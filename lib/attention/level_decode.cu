#include <string>

#include "attention/level_decode.h"
#include "attention/merge_device.h"
#include "core/error.h"
#include "device/pairs.h"

namespace vqkv {
namespace {

// Blocks of a multiprocessor: without the number the compiler spills 8 bytes for sm_80.
constexpr int kHeads = kLevelGroup, kWarps = 4, kThreads = kWarps * 32, kStages = 3, kBlocks = 3;

template <int kDim_, int kBits_>
struct Levels {
  static constexpr int kDim = kDim_, kBits = kBits_;
  static constexpr int kSteps = kDim / 16, kGroups = kDim / 32;  // of 16 channels; groups of values
  static constexpr int kPairs = 16 / kBits;                      // of codes, in a word
  static constexpr int kWords = kSteps * 2 * kBits / 4;          // of a lane, a role and tile
  static constexpr int kLoads = kWords / 4;
  static constexpr int kSides = kDim / 4;                    // of 16 bytes, a role and tile
  static constexpr int kStage = 2 * (kLoads * 32 + kSides);  // of 16 bytes
};

__device__ __forceinline__ uint32_t twice(float v) { return device::f16_pair(v, v); }
__device__ __forceinline__ uint32_t times(uint32_t a, uint32_t b) {
  return device::bits_as<uint32_t>(__hmul2(device::bits_as<__half2>(a), device::bits_as<__half2>(b)));
}

// The codes of a word as pairs of halves. Bits or'ed into the mantissa of 1024 make 1024 + code * 2^place, exactly.
template <class L>
__device__ __forceinline__ void unpack(uint32_t word, uint32_t (&pairs)[L::kPairs]) {
  constexpr uint32_t kMask = ((1u << L::kBits) - 1) * 0x00010001u;
#pragma unroll
  for (int k = 0; k < L::kPairs; ++k) {
    const int place = k * L::kBits % 8;
    const uint32_t part = k * L::kBits < 8 ? word : word >> 8;
    const uint32_t number = (part & kMask << place) | 0x64006400u;
    const float unit = 1.0f / static_cast<float>(1 << place);
    pairs[k] =
        device::bits_as<uint32_t>(__hfma2(device::bits_as<__half2>(number), device::bits_as<__half2>(twice(unit)),
                                          device::bits_as<__half2>(twice(-1024.0f * unit))));
  }
}

__device__ __forceinline__ uint32_t word_of(const uint4& four, int i) {
  return i == 0 ? four.x : i == 1 ? four.y : i == 2 ? four.z : four.w;
}

// Scores are products of codes (tokens by channels) and of the query times the scales of channels (channels by heads),
// plus that of zeros and the query. Outputs are products of codes (channels by tokens) and of weights times the scales
// of tokens (tokens by heads), one for each group of channels, plus those of zeros and the weights.
template <class L>
__global__ void __launch_bounds__(kThreads, kBlocks) level_decode_kernel(LevelDecode p, SplitStates states) {
  device::Shared shared;
  uint4* stages = shared.take<uint4>(kWarps * kStages * L::kStage);
  float* out_of = shared.take<float>(kWarps * kHeads * L::kDim);
  float* state_of = shared.take<float>(kWarps * kHeads * 2);
  unsigned* last = shared.take<unsigned>(1);

  const int warp = __shfl_sync(device::kAllLanes, static_cast<int>(threadIdx.x >> 5), 0);
  const int lane = static_cast<int>(threadIdx.x & 31), quad = lane / 4, part = lane % 4;
  const int splits = static_cast<int>(gridDim.x), split = static_cast<int>(blockIdx.x);
  const int head = static_cast<int>(blockIdx.y), sequence = static_cast<int>(blockIdx.z);
  const int row = sequence * p.kv_heads + head, length = p.lengths[sequence];
  const int exact = p.exact.lengths ? p.exact.lengths[sequence] : 0, coded = (length + kLevelTile - 1) / kLevelTile;
  const int tiles = coded + (exact + kLevelTile - 1) / kLevelTile,
            each = (tiles + splits - 1) / splits;  // exact ones last
  const int end = min(tiles, (split + 1) * each);
  uint4* mine = stages + warp * kStages * L::kStage;

  // A stage: a lane's words of keys, of values, sides of keys, of values.
  const auto fetch = [&](int tile, int stage) {
    if (tile < min(end, coded)) {
      const size_t at = static_cast<size_t>(p.tile_table[sequence * p.most_tiles + tile]) * p.kv_heads + head;
      uint4* to = mine + stage * L::kStage;
      const auto* keys = reinterpret_cast<const uint4*>(p.key_codes) + at * (L::kLoads * 32) + lane;
      const auto* values = reinterpret_cast<const uint4*>(p.value_codes) + at * (L::kLoads * 32) + lane;
#pragma unroll
      for (int i = 0; i < L::kLoads; ++i) {
        device::copy_async16(to + i * 32 + lane, keys + i * 32);
        device::copy_async16(to + (L::kLoads + i) * 32 + lane, values + i * 32);
      }
      if (lane < L::kSides) {
        device::copy_async16(to + 2 * L::kLoads * 32 + lane,
                             reinterpret_cast<const uint4*>(p.key_sides) + at * L::kSides + lane);
        device::copy_async16(to + 2 * L::kLoads * 32 + L::kSides + lane,
                             reinterpret_cast<const uint4*>(p.value_sides) + at * L::kSides + lane);
      }
    }
    device::commit_copies();
  };

  // Of head `quad`: channels 16 s + 2 part and the next (0), and 8 further (1).
  uint32_t query[L::kSteps][2];
#pragma unroll
  for (int s = 0; s < L::kSteps; ++s)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      query[s][i] = 0;
      if (quad < p.group) {
        const float2 q = device::load(
            reinterpret_cast<const float2*>(p.queries + (row * p.group + quad) * L::kDim + s * 16 + i * 8 + part * 2));
        query[s][i] = device::f16_pair(q.x, q.y);
      }
    }

  // Of heads 2 part and the next; outputs of channels 16 s + quad (0, 1) and 8 further (2, 3).
  float most[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
  float out[L::kSteps][4] = {}, of_zeros[L::kGroups][4] = {};

  // Tokens [first, first + kLevelTile) of their kind, those below `limit`. score() gives the scores of two blocks of
  // 16: of token quad with heads 2 part and the next, of token quad + 8 with them. add() takes weights in half, turned:
  // of each block tokens 2 part and the next for head quad, and 8 further.
  const auto take = [&](int first, int limit, auto score, auto add) {
    float scores[2][4];
    score(scores);
    if (first + kLevelTile > limit) {
#pragma unroll
      for (int b = 0; b < 2; ++b)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (first + b * 16 + i / 2 * 8 + quad >= limit) scores[b][i] = -INFINITY;
    }
    float fade[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float now = fmaxf(fmaxf(scores[0][h], scores[0][h + 2]), fmaxf(scores[1][h], scores[1][h + 2]));
      now = fmaxf(now, most[h]);
#pragma unroll
      for (const int step : {4, 8, 16}) now = fmaxf(now, __shfl_xor_sync(device::kAllLanes, now, step));
      fade[h] = device::exp2_fast(most[h] - now);
      most[h] = now;
      sum[h] *= fade[h];
#pragma unroll
      for (int b = 0; b < 2; ++b)
#pragma unroll
        for (int i = h; i < 4; i += 2) {
          scores[b][i] = device::exp2_fast(scores[b][i] - now);
          sum[h] += scores[b][i];
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int s = 0; s < L::kSteps; ++s) out[s][i] *= fade[i % 2];
#pragma unroll
      for (int g = 0; g < L::kGroups; ++g) of_zeros[g][i] *= fade[i % 2];
    }

    uint32_t weights[2][2];
#pragma unroll
    for (int b = 0; b < 2; ++b)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        weights[b][i] = device::transpose8(device::f16_pair(scores[b][2 * i], scores[b][2 * i + 1]));
    add(weights);
  };

  int tile = split * each + warp;
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) fetch(tile + s * kWarps, s);
  for (int stage = 0; tile < min(end, coded); tile += kWarps, stage = stage + 1 == kStages ? 0 : stage + 1) {
    fetch(tile + (kStages - 1) * kWarps, stage == 0 ? kStages - 1 : stage - 1);
    device::wait_copies<kStages - 1>();
    __syncwarp();  // the other lanes' copies
    const uint4* key_words = mine + stage * L::kStage + lane;
    const uint4* value_words = key_words + L::kLoads * 32;
    const uint4* key_sides = mine + stage * L::kStage + 2 * L::kLoads * 32 + part;
    const uint4* value_sides = key_sides + L::kSides;
    const auto score = [&](float(&scores)[2][4]) {
      // The same for all tokens of the tile.
      float zero[4] = {0, 0, 0, 0};
      uint32_t scaled[L::kSteps][2];
#pragma unroll
      for (int s = 0; s < L::kSteps; s += 2) {
        const uint4 scales = device::load(key_sides + s / 2 * 4);
        const uint4 zeros = device::load(key_sides + (L::kSteps / 2 + s / 2) * 4);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          scaled[s + i][0] = times(query[s + i][0], word_of(scales, 2 * i));
          scaled[s + i][1] = times(query[s + i][1], word_of(scales, 2 * i + 1));
          const uint32_t low = word_of(zeros, 2 * i), high = word_of(zeros, 2 * i + 1);
          const uint32_t a[4] = {low, low, high, high};
          device::multiply_f16(zero, a, query[s + i]);
        }
      }
#pragma unroll
      for (int b = 0; b < 2; ++b)
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[b][i] = zero[i];
#pragma unroll
      for (int i = 0; i < L::kLoads; ++i) {
        const uint4 four = device::load(key_words + i * 32);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int word = i * 4 + j;
          uint32_t pairs[L::kPairs];
          unpack<L>(word_of(four, j), pairs);
#pragma unroll
          for (int k = 0; k < L::kPairs; k += 4) {
            const uint32_t a[4] = {pairs[k], pairs[k + 1], pairs[k + 2], pairs[k + 3]};
            device::multiply_f16(scores[L::kBits == 4 ? word / L::kSteps : k / 4], a, scaled[word % L::kSteps]);
          }
        }
      }
    };
    const auto add = [&](const uint32_t(&weights)[2][2]) {
      // Times the scales of each group.
      uint32_t weighted[2][L::kGroups][2];
#pragma unroll
      for (int b = 0; b < 2; ++b) {
#pragma unroll
        for (int g = 0; g < L::kGroups; g += 2) {
          const uint4 scales = device::load(value_sides + (b * L::kGroups + g / 2) * 4);
          const uint4 zeros = device::load(value_sides + (b * L::kGroups + L::kGroups / 2 + g / 2) * 4);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            weighted[b][g + i][0] = times(weights[b][0], word_of(scales, 2 * i));
            weighted[b][g + i][1] = times(weights[b][1], word_of(scales, 2 * i + 1));
            const uint32_t low = word_of(zeros, 2 * i), high = word_of(zeros, 2 * i + 1);
            const uint32_t a[4] = {low, low, high, high};
            device::multiply_f16(of_zeros[g + i], a, weights[b]);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < L::kLoads; ++i) {
        const uint4 four = device::load(value_words + i * 32);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int word = i * 4 + j, step = word % L::kSteps;
          uint32_t pairs[L::kPairs];
          unpack<L>(word_of(four, j), pairs);
#pragma unroll
          for (int k = 0; k < L::kPairs; k += 4) {
            const uint32_t a[4] = {pairs[k], pairs[k + 1], pairs[k + 2], pairs[k + 3]};
            device::multiply_f16(out[step], a, weighted[L::kBits == 4 ? word / L::kSteps : k / 4][step / 2]);
          }
        }
      }
    };
    take(tile * kLevelTile, length, score, add);
    __syncwarp();  // this stage is read before it is filled again
  }
  for (; tile < end; tile += kWarps) {
    const int first = (tile - coded) * kLevelTile;
    // A pair of channels of a row; zeros beyond the last.
    const auto pair_of = [&](const uint16_t* rows, int token, int channel) -> uint32_t {
      if (token >= exact) return 0;
      const int page = p.exact.page_table[sequence * p.exact.most_pages + token / kDevicePageTokens];
      const size_t at = (static_cast<size_t>(page) * static_cast<size_t>(p.kv_heads) + static_cast<size_t>(head)) *
                            kDevicePageTokens +
                        static_cast<size_t>(token % kDevicePageTokens);
      return device::load(reinterpret_cast<const uint32_t*>(rows + at * L::kDim + static_cast<size_t>(channel)));
    };
    const auto score = [&](float(&scores)[2][4]) {
#pragma unroll
      for (int b = 0; b < 2; ++b) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[b][i] = 0;
#pragma unroll
        for (int s = 0; s < L::kSteps; ++s) {
          uint32_t a[4];
#pragma unroll
          for (int i = 0; i < 4; ++i)
            a[i] = pair_of(p.exact.keys, first + b * 16 + i % 2 * 8 + quad, s * 16 + i / 2 * 8 + part * 2);
          device::multiply_f16(scores[b], a, query[s]);
        }
      }
    };
    const auto add = [&](const uint32_t(&weights)[2][2]) {
#pragma unroll
      for (int b = 0; b < 2; ++b)
#pragma unroll
        for (int s = 0; s < L::kSteps; ++s) {
          uint32_t a[4];
#pragma unroll
          for (int i = 0; i < 4; ++i)
            a[i] = device::transpose8(
                pair_of(p.exact.values, first + b * 16 + i / 2 * 8 + quad, s * 16 + i % 2 * 8 + part * 2));
          device::multiply_f16(out[s], a, weights[b]);
        }
    };
    take(first, exact, score, add);
  }
  device::wait_copies<0>();

#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (const int step : {4, 8, 16}) sum[h] += __shfl_xor_sync(device::kAllLanes, sum[h], step);
#pragma unroll
  for (int s = 0; s < L::kSteps; ++s)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      out_of[(warp * kHeads + part * 2 + i % 2) * L::kDim + s * 16 + i / 2 * 8 + quad] = out[s][i] + of_zeros[s / 2][i];
  if (quad == 0)
    for (int h = 0; h < 2; ++h) {
      state_of[(warp * kHeads + part * 2 + h) * 2] = most[h];
      state_of[(warp * kHeads + part * 2 + h) * 2 + 1] = sum[h];
    }
  __syncthreads();
  float* result = p.out + row * p.group * L::kDim;
  merge_warps<kWarps, kHeads, L::kDim>(out_of, state_of, states, row, split, splits, p.group, result);
  if (splits > 1) merge_splits<kThreads, kHeads, L::kDim>(states, row, splits, last, p.group, result);
}

template <class L>
void launch_levels(const LevelDecode& call, int splits, const SplitStates& states) {
  constexpr size_t kBytes =
      sizeof(uint4) * kWarps * kStages * L::kStage + sizeof(float) * kWarps * kHeads * (L::kDim + 2) + 16;
  const dim3 grid(static_cast<unsigned>(splits), static_cast<unsigned>(call.kv_heads),
                  static_cast<unsigned>(call.sequences));
  device::launch(level_decode_kernel<L>, {grid, dim3(kThreads), kBytes}, call, states);
}

}  // namespace

LevelDecoder::LevelDecoder(int sequences, int kv_heads, int group, int head_dim, int bits, int splits)
    : head_dim_(head_dim), bits_(bits), room_(sequences * kv_heads, splits, kHeads, head_dim) {
  if (group > kHeads)
    fail_usage("attention on levels on a device: " + std::to_string(group) +
               " query heads a KV head; kernels are compiled for up to " + std::to_string(kHeads));
  if ((head_dim != 64 && head_dim != 128) || (bits != 2 && bits != 4))
    fail_usage("attention on levels on a device: head_dim " + std::to_string(head_dim) + " at " + std::to_string(bits) +
               " bits; kernels are compiled for head_dim 64 and 128 at 2 and 4 bits");
}

void LevelDecoder::operator()(const LevelDecode& call) {
  const SplitStates states = room_.states();
  if (head_dim_ == 128) {
    if (bits_ == 4) return launch_levels<Levels<128, 4>>(call, room_.splits(), states);
    return launch_levels<Levels<128, 2>>(call, room_.splits(), states);
  }
  if (bits_ == 4) return launch_levels<Levels<64, 4>>(call, room_.splits(), states);
  return launch_levels<Levels<64, 2>>(call, room_.splits(), states);
}

}  // namespace vqkv
