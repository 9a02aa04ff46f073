#include <string>
#include <type_traits>

#include "attention/merge_device.h"
#include "attention/pq_decode.h"
#include "core/error.h"
#include "device/pairs.h"

namespace vqkv {
namespace {

// Four query heads are worked on, whatever the group: a table of their scores has half a number for each.
constexpr int kHeads = kPqGroup, kWarps = 8, kThreads = kWarps * 32;

template <int kBooks_, int kWidth_>
struct Codes {
  static constexpr int kBooks = kBooks_, kWidth = kWidth_, kDim = kBooks * kWidth;
  static constexpr int kAtOnce = 32 / kBooks;         // tokens, one a group of kBooks lanes
  static constexpr int kLookups = kPqTile / kAtOnce;  // of a lane, a tile
  static constexpr int kLoads = kLookups / 16;        // of 16 codes
  static constexpr int kTileBytes = kPqTile * kBooks;
  using Word = std::conditional_t<kWidth == 4, uint2, uint4>;  // a codeword of values in half
  static_assert((kAtOnce == 1 || kAtOnce == 2) && (kWidth == 4 || kWidth == 8));
  // Weights of a tile, where a lane's tokens follow each other.
  __device__ static int place(int token) { return kAtOnce == 1 ? token : token % kAtOnce * kLookups + token / kAtOnce; }
};

// Scores of every codeword with four heads' parts of the query, (slot, head) in half, by tensor cores: A holds 4 heads
// times the books of 16 channels, a block a book; B 8 codewords of those books.
template <class C>
__device__ void fill_table(const PqDecode& p, int row, int head, uint2* table, int warp, int lane) {
  constexpr int kTogether = 16 / C::kWidth, kParts = C::kBooks / kTogether;  // books
  constexpr int kShare = kPqEntries * kParts / kWarps;                       // codewords of a warp
  static_assert(kShare % 8 == 0 && kWarps % kParts == 0);
  const int m = lane / 4, pair = lane % 4 * 2;
  const uint16_t* books = p.key_books + static_cast<size_t>(head) * C::kBooks * kPqEntries * C::kWidth;
  auto* half_table = reinterpret_cast<__half*>(table);
  const int first = warp % kParts * kTogether, from = warp / kParts * kShare;
  uint32_t a[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int r = m + i % 2 * 8, k = pair + i / 2 * 8, g = r / kTogether, book = r % kTogether;
    a[i] = 0;
    if (k / C::kWidth == book && g < p.group) {
      const float2 q = device::load(reinterpret_cast<const float2*>(p.queries + (row * p.group + g) * C::kDim +
                                                                    (first + book) * C::kWidth + k % C::kWidth));
      a[i] = device::f16_pair(q.x, q.y);
    }
  }
  for (int s = from; s < from + kShare; s += 8) {
    uint32_t b[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int k = pair + i * 8;
      b[i] = device::load(reinterpret_cast<const uint32_t*>(
          books + (((first + k / C::kWidth) * kPqEntries + s + m) * C::kWidth + k % C::kWidth)));
    }
    float c[4] = {0, 0, 0, 0};
    device::multiply_f16(c, a, b);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = m + i / 2 * 8;
      if (r < kHeads * kTogether)
        half_table[pq_value_slot(4, first + r % kTogether, s + pair + i % 2) * kHeads + r / kTogether] =
            __float2half_rn(c[i]);
    }
  }
}

// Code t of 16 in four words: one permute, where a shift and a mask are two instructions.
__device__ __forceinline__ unsigned code_of(const uint4& codes, int t) {
  const unsigned word = t < 4 ? codes.x : t < 8 ? codes.y : t < 12 ? codes.z : codes.w;
  return __byte_perm(word, 0, 0x4440u + static_cast<unsigned>(t % 4));
}

// entry_of(i): what a lane's channels add to the scores of its i-th token and four heads, in half. Tensor cores sum
// over the lanes: four neighbours, with heads of four tokens side by side in C; then, of C turned, the fours of a
// token. An entry's two pairs of heads lie in A's upper and lower rows, as a load left them in registers. scores: lane
// l holds heads l / 4 % 2 (0, 1) and 2 more (2, 3) of tokens my_token of the kernel (0, 2) and kFurther on (1, 3).
template <class C, class Entry>
__device__ __forceinline__ void score_tile(Entry entry_of, const uint32_t (&pick)[2][2],
                                           const uint32_t (&gather)[4 / C::kAtOnce][2], float (&scores)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) scores[i] = 0;
#pragma unroll
  for (int two = 0; two < 4 / C::kAtOnce; ++two) {
    uint32_t turned[4];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int first = (two * 2 + j) * 4;  // of four tokens
      uint2 entry[4];
#pragma unroll
      for (int t = 0; t < 4; ++t) entry[t] = entry_of(first + t);
      float c[4] = {0, 0, 0, 0};
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const uint32_t a[4] = {entry[2 * t].x, entry[2 * t].y, entry[2 * t + 1].x, entry[2 * t + 1].y};
        device::multiply_f16(c, a, pick[t]);
      }
      turned[2 * j] = device::transpose8(device::f16_pair(c[0], c[1]));
      turned[2 * j + 1] = device::transpose8(device::f16_pair(c[2], c[3]));
    }
    device::multiply_f16(scores, turned, gather[two]);
  }
}

// A lane's channels of an exact row; zeros beyond the last.
template <class C>
__device__ __forceinline__ typename C::Word exact_word(const uint16_t* rows, const PqDecode& p, int head, int sequence,
                                                       int token, int tokens, int book) {
  if (token >= tokens) return {};
  const int page = p.exact.page_table[sequence * p.exact.most_pages + token / kDevicePageTokens];
  const size_t row =
      (static_cast<size_t>(page) * static_cast<size_t>(p.kv_heads) + static_cast<size_t>(head)) * kDevicePageTokens +
      static_cast<size_t>(token % kDevicePageTokens);
  return device::load(
      reinterpret_cast<const typename C::Word*>(rows + row * C::kDim + static_cast<size_t>(book * C::kWidth)));
}

// What a lane's channels of an exact key add to the scores of four heads.
template <class C>
__device__ __forceinline__ uint2 exact_entry(const PqDecode& p, int row, int head, int sequence, int token, int tokens,
                                             int book) {
  const auto word = exact_word<C>(p.exact.keys, p, head, sequence, token, tokens, book);
  uint32_t pairs[4] = {word.x, word.y, 0, 0};
  if constexpr (C::kWidth == 8) pairs[2] = word.z, pairs[3] = word.w;
  float sum[kHeads] = {0, 0, 0, 0};
#pragma unroll
  for (int g = 0; g < kHeads; ++g) {
    if (g >= p.group) break;
    const float* query = p.queries + (row * p.group + g) * C::kDim + book * C::kWidth;
#pragma unroll
    for (int i = 0; i < C::kWidth / 2; ++i) {
      const float2 k = __half22float2(device::bits_as<__half2>(pairs[i]));
      const float2 q = device::load(reinterpret_cast<const float2*>(query) + i);
      sum[g] = fmaf(q.x, k.x, fmaf(q.y, k.y, sum[g]));
    }
  }
  return make_uint2(device::f16_pair(sum[0], sum[1]), device::f16_pair(sum[2], sum[3]));
}

// Adds a token's codeword of values to four heads', by their weights.
template <class C>
__device__ __forceinline__ void add_word(const typename C::Word& word, uint32_t weights01, uint32_t weights23,
                                         __half2 (&added)[kHeads][C::kWidth / 2]) {
  uint32_t pairs[4];
  pairs[0] = word.x, pairs[1] = word.y;
  if constexpr (C::kWidth == 8) pairs[2] = word.z, pairs[3] = word.w;
  const auto low = device::bits_as<__half2>(weights01), high = device::bits_as<__half2>(weights23);
#pragma unroll
  for (int g = 0; g < kHeads; ++g) {
    const __half2 two = g < 2 ? low : high, weight = g % 2 == 0 ? __low2half2(two) : __high2half2(two);
#pragma unroll
    for (int i = 0; i < C::kWidth / 2; ++i)
      added[g][i] = __hfma2(weight, device::bits_as<__half2>(pairs[i]), added[g][i]);
  }
}

template <class C>
__global__ void __launch_bounds__(kThreads) pq_decode_kernel(PqDecode p, SplitStates states) {
  device::Shared shared;
  auto* table = shared.take<uint2>(C::kBooks * kPqEntries);  // (slot): four heads in half
  auto* values = shared.take<typename C::Word>(C::kBooks * kPqEntries);
  auto* weights = shared.take<uint2>(kWarps * kPqTile);  // (warp, place): four heads in half
  float* fades = shared.take<float>(kWarps * kHeads);
  float* out_of = shared.take<float>(kWarps * kHeads * C::kDim);
  float* state_of = shared.take<float>(kWarps * kHeads * 2);
  unsigned* last = shared.take<unsigned>(1);

  const int warp = __shfl_sync(device::kAllLanes, static_cast<int>(threadIdx.x >> 5), 0);
  const int lane = static_cast<int>(threadIdx.x & 31), book = lane % C::kBooks, which = lane / C::kBooks;
  const int splits = static_cast<int>(gridDim.x), split = static_cast<int>(blockIdx.x);
  const int head = static_cast<int>(blockIdx.y), sequence = static_cast<int>(blockIdx.z);
  const int row = sequence * p.kv_heads + head, length = p.lengths[sequence];
  const int exact = p.exact.lengths ? p.exact.lengths[sequence] : 0, coded = (length + kPqTile - 1) / kPqTile;
  const int tiles = coded + (exact + kPqTile - 1) / kPqTile, each = (tiles + splits - 1) / splits;  // exact ones last
  const int end = min(tiles, (split + 1) * each);

  fill_table<C>(p, row, head, table, warp, lane);
  constexpr int kChunks = C::kBooks * kPqEntries * C::kWidth / 8;
  const auto* books = reinterpret_cast<const uint4*>(p.value_books) + static_cast<size_t>(head) * kChunks;
  for (int i = static_cast<int>(threadIdx.x); i < kChunks; i += kThreads)
    device::copy_async16(reinterpret_cast<uint4*>(values) + i, books + i);
  device::commit_copies();
  device::wait_copies<0>();
  __syncthreads();

  // Which of a lane's numbers go to which column of C: a pair of heads of four lookups, two at a time; then which fours
  // of lanes, of which token, to which column of the scores.
  const int column = lane / 4, pair = lane % 4;
  uint32_t pick[2][2], gather[4 / C::kAtOnce][2];
#pragma unroll
  for (int t = 0; t < 2; ++t)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int g = column - 4 * t - 2 * i;
      pick[t][i] = device::f16_pair(g == 0 ? 1.0f : 0.0f, g == 1 ? 1.0f : 0.0f);
    }
#pragma unroll
  for (int two = 0; two < 4 / C::kAtOnce; ++two)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float one = column == (two * 2 + i) * C::kAtOnce + pair * C::kAtOnce / 4 ? 1.0f : 0.0f;
      gather[two][i] = device::f16_pair(one, one);
    }
  // Of a lane's scores: its first token, and how far the second is.
  const int my_token = 8 * pair + lane / 8 * C::kAtOnce;
  constexpr int kFurther = C::kAtOnce == 1 ? 4 : 1;

  const uint2* my_scores = table + pq_value_slot(4, book, 0);
  const auto* my_values = values + pq_value_slot(C::kWidth, book, 0);
  uint2* my_weights = weights + warp * kPqTile;
  const int my_head = lane / 4 % 2;
  float most[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};  // of my_head and my_head + 2
  float out[kHeads][C::kWidth] = {};

  const auto codes_of = [&](const uint8_t* all, int tile, uint4(&codes)[C::kLoads]) {
    if (tile >= min(end, coded)) return;
    const size_t at = static_cast<size_t>(p.tile_table[sequence * p.most_tiles + tile]) * p.kv_heads + head;
    const auto* from = reinterpret_cast<const uint4*>(all + at * C::kTileBytes) + lane;
#pragma unroll
    for (int i = 0; i < C::kLoads; ++i) codes[i] = device::load(from + i * 32);
  };

  // Tokens [first, first + kPqTile) of their kind, those below `limit`: scores by entry_of, then values by word_of.
  const auto take = [&](int first, int limit, auto entry_of, auto word_of) {
    float scores[4];
    score_tile<C>(entry_of, pick, gather, scores);
    if (first + kPqTile > limit) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (first + my_token + i % 2 * kFurther >= limit) scores[i] = -INFINITY;
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
        my_half[C::place(my_token + kFurther * i) * kHeads + my_head + 2 * h] = __float2half_rn(weight);
      }
      if (pair == 0 && lane < 8) fades[warp * kHeads + my_head + 2 * h] = fade;
    }
    __syncwarp();

    __half2 added[kHeads][C::kWidth / 2];
#pragma unroll
    for (int g = 0; g < kHeads; ++g)
#pragma unroll
      for (int i = 0; i < C::kWidth / 2; ++i) added[g][i] = __floats2half2_rn(0.0f, 0.0f);
    const uint2* weights_of = my_weights + which * C::kLookups;
#pragma unroll
    for (int t = 0; t < C::kLookups; t += 2) {
      const uint4 both = device::load(reinterpret_cast<const uint4*>(weights_of + t));
#pragma unroll
      for (int i = 0; i < 2; ++i)
        add_word<C>(word_of(t + i), i == 0 ? both.x : both.z, i == 0 ? both.y : both.w, added);
    }
    const float4 all_fades = device::load(reinterpret_cast<const float4*>(fades + warp * kHeads));
    const float fade_of[kHeads] = {all_fades.x, all_fades.y, all_fades.z, all_fades.w};
#pragma unroll
    for (int g = 0; g < kHeads; ++g)
#pragma unroll
      for (int i = 0; i < C::kWidth / 2; ++i) {
        const float2 two = __half22float2(added[g][i]);
        out[g][2 * i] = fmaf(out[g][2 * i], fade_of[g], two.x);
        out[g][2 * i + 1] = fmaf(out[g][2 * i + 1], fade_of[g], two.y);
      }
    __syncwarp();  // weights are read before they are written again
  };

  int tile = split * each + warp;
  uint4 keys[C::kLoads] = {}, next_keys[C::kLoads] = {}, value_codes[C::kLoads] = {}, next_values[C::kLoads] = {};
  codes_of(p.key_codes, tile, keys);
  codes_of(p.value_codes, tile, value_codes);
  for (; tile < min(end, coded); tile += kWarps) {
    codes_of(p.key_codes, tile + kWarps, next_keys);
    codes_of(p.value_codes, tile + kWarps, next_values);
    take(
        tile * kPqTile, length, [&](int i) { return device::load(my_scores + code_of(keys[i / 16], i % 16) * 16); },
        [&](int i) { return device::load(my_values + code_of(value_codes[i / 16], i % 16) * (64 / C::kWidth)); });
#pragma unroll
    for (int i = 0; i < C::kLoads; ++i) keys[i] = next_keys[i], value_codes[i] = next_values[i];
  }
  for (; tile < end; tile += kWarps) {
    const int first = (tile - coded) * kPqTile;
    const auto token_of = [&](int i) { return first + i * C::kAtOnce + which; };
    take(
        first, exact, [&](int i) { return exact_entry<C>(p, row, head, sequence, token_of(i), exact, book); },
        [&](int i) { return exact_word<C>(p.exact.values, p, head, sequence, token_of(i), exact, book); });
  }

  // Other lanes of a head hold other tokens' weights, those of a book other tokens' values.
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (const int step : {1, 2, 8, 16}) sum[h] += __shfl_xor_sync(device::kAllLanes, sum[h], step);
#pragma unroll
  for (int g = 0; g < kHeads; ++g) {
    if (C::kAtOnce == 2)
#pragma unroll
      for (int i = 0; i < C::kWidth; ++i) out[g][i] += __shfl_xor_sync(device::kAllLanes, out[g][i], 16);
    if (which > 0) continue;
#pragma unroll
    for (int i = 0; i < C::kWidth; i += 4)
      device::store(reinterpret_cast<float4*>(out_of + (warp * kHeads + g) * C::kDim + book * C::kWidth + i),
                    make_float4(out[g][i], out[g][i + 1], out[g][i + 2], out[g][i + 3]));
  }
  if (pair == 0 && lane < 8)
    for (int h = 0; h < 2; ++h) {
      state_of[(warp * kHeads + my_head + 2 * h) * 2] = most[h];
      state_of[(warp * kHeads + my_head + 2 * h) * 2 + 1] = sum[h];
    }
  __syncthreads();
  float* result = p.out + row * p.group * C::kDim;
  merge_warps<kWarps, kHeads, C::kDim>(out_of, state_of, states, row, split, splits, p.group, result);
  if (splits > 1) merge_splits<kThreads, kHeads, C::kDim>(states, row, splits, last, p.group, result);
}

template <class C>
void launch_pq(const PqDecode& call, int splits, const SplitStates& states) {
  constexpr size_t kBytes = (sizeof(uint2) + sizeof(typename C::Word)) * C::kBooks * kPqEntries +
                            sizeof(uint2) * kWarps * kPqTile + sizeof(float) * kWarps * kHeads * (1 + C::kDim + 2) + 16;
  const dim3 grid(static_cast<unsigned>(splits), static_cast<unsigned>(call.kv_heads),
                  static_cast<unsigned>(call.sequences));
  device::launch(pq_decode_kernel<C>, {grid, dim3(kThreads), kBytes}, call, states);
}

}  // namespace

PqDecoder::PqDecoder(int sequences, int kv_heads, int group, int books, int width, int splits)
    : books_(books), width_(width), room_(sequences * kv_heads, splits, kHeads, books * width) {
  if (group > kHeads)
    fail_usage("attention on product codes on a device: " + std::to_string(group) +
               " query heads a KV head; kernels are compiled for up to " + std::to_string(kHeads));
  if (!pq_decoder_fits(books, width))
    fail_usage("attention on product codes on a device: " + std::to_string(books) + " books of " +
               std::to_string(width) + " channels; kernels are compiled for " + kPqDecoderShapes);
}

void PqDecoder::operator()(const PqDecode& call) {
  const SplitStates states = room_.states();
  if (books_ == 32) return launch_pq<Codes<32, 4>>(call, room_.splits(), states);
  if (width_ == 8) return launch_pq<Codes<16, 8>>(call, room_.splits(), states);
  return launch_pq<Codes<16, 4>>(call, room_.splits(), states);
}

}  // namespace vqkv
