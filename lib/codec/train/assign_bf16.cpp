// g++ 12 takes the undefined starting value of its own intrinsics for a mistake.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <algorithm>
#include <limits>

#include "codec/train/assign_tile.h"
#include "core/round_up.h"

namespace vqkv::assign {
namespace {

constexpr int kVectors = 4;   // kTile / 16 lanes
constexpr int kTogether = 2;  // row vectors scored together: 8 x 2 sums
constexpr int kPending = 8;   // fp32 chains in flight hide the latency of the multiply-add
constexpr float kLongest = 1e18f;

inline __m512 dot(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

// Rounds a tile to (pairs, kTile) of two neighbouring channels, an odd last one paired with zero; length (kTile) of the
// rows and of what rounding took from them. False where a row is too long.
bool narrow_tile(const float* tile, int64_t channels, uint32_t* out, float* length, float* lost) {
  for (int v = 0; v < kVectors; ++v) {
    __m512 square = _mm512_setzero_ps(), lost_square = _mm512_setzero_ps();
    const auto narrow = [&](int64_t k) {
      const __m512 x = _mm512_load_ps(tile + k * kTile + 16 * v);
      const __m512i n = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
      const __m512 d = _mm512_sub_ps(x, _mm512_castsi512_ps(_mm512_slli_epi32(n, 16)));
      square = _mm512_fmadd_ps(x, x, square);
      lost_square = _mm512_fmadd_ps(d, d, lost_square);
      return n;
    };
    for (int64_t k = 0; k < channels; k += 2) {
      const __m512i low = narrow(k), high = k + 1 < channels ? narrow(k + 1) : _mm512_setzero_si512();
      _mm512_store_si512(out + k / 2 * kTile + 16 * v, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
    const __m512 norm = _mm512_sqrt_ps(square);
    if (_mm512_cmp_ps_mask(norm, _mm512_set1_ps(kLongest), _CMP_LE_OQ) != 0xffff) return false;
    _mm512_store_ps(length + 16 * v, norm);
    _mm512_store_ps(lost + 16 * v, _mm512_sqrt_ps(lost_square));
  }
  return true;
}

// Lower bounds of every block's best score, (blocks, kTile), and an upper bound of each row's best, (kTile).
template <int kPairs>
void screen(const Bf16Job& job, const uint32_t* tile, const float* length, const float* lost, float* low,
            float* upper) {
  const int64_t pairs = kPairs > 0 ? kPairs : (job.exact->channels + 1) / 2;
  for (int v0 = 0; v0 < kVectors; v0 += kTogether) {
    __m512 norm[kTogether], loss[kTogether], bound[kTogether];
    for (int r = 0; r < kTogether; ++r) {
      norm[r] = _mm512_load_ps(length + 16 * (v0 + r));
      loss[r] = _mm512_load_ps(lost + 16 * (v0 + r));
      bound[r] = _mm512_set1_ps(std::numeric_limits<float>::infinity());
    }
    const uint32_t* c = job.pairs;
    for (int64_t b = 0; b < job.exact->blocks; ++b) {
      __m512 sum[kBlock][kTogether];
#pragma GCC unroll 8
      for (int i = 0; i < kBlock; ++i)
#pragma GCC unroll 4
        for (int r = 0; r < kTogether; ++r) sum[i][r] = _mm512_set1_ps(job.exact->half_norm[b * kBlock + i]);
      const uint32_t* t = tile + 16 * v0;
#pragma GCC unroll 8
      for (int64_t p = 0; p < pairs; ++p, c += kBlock, t += kTile) {
        __m512i x[kTogether];
#pragma GCC unroll 4
        for (int r = 0; r < kTogether; ++r) x[r] = _mm512_load_si512(t + 16 * r);
#pragma GCC unroll 8
        for (int i = 0; i < kBlock; ++i) {
          const __m512i codeword = _mm512_set1_epi32(static_cast<int>(c[i]));
#pragma GCC unroll 4
          for (int r = 0; r < kTogether; ++r) sum[i][r] = dot(sum[i][r], x[r], codeword);
        }
      }
      const Bf16Bound& e = job.bound[b];
      const __m512 by_length = _mm512_set1_ps(e.by_length), by_loss = _mm512_set1_ps(e.by_loss);
      const __m512 offset = _mm512_set1_ps(e.offset);
#pragma GCC unroll 4
      for (int r = 0; r < kTogether; ++r) {
        const __m512 best =
            _mm512_min_ps(_mm512_min_ps(_mm512_min_ps(sum[0][r], sum[1][r]), _mm512_min_ps(sum[2][r], sum[3][r])),
                          _mm512_min_ps(_mm512_min_ps(sum[4][r], sum[5][r]), _mm512_min_ps(sum[6][r], sum[7][r])));
        const __m512 error = _mm512_fmadd_ps(loss[r], by_loss, _mm512_fmadd_ps(norm[r], by_length, offset));
        _mm512_store_ps(low + b * kTile + 16 * (v0 + r), _mm512_sub_ps(best, error));
        bound[r] = _mm512_min_ps(bound[r], _mm512_add_ps(best, error));
      }
    }
    for (int r = 0; r < kTogether; ++r) _mm512_store_ps(upper + 16 * (v0 + r), bound[r]);
  }
}

// fp32 scores of (block, row) pairs, by the chain of assign.cpp: s <- fma(-c[k], x[k], s) from |c|^2/2, k ascending.
// Pairs come with ascending blocks for each row, so that ties stay with the lowest index.
void resolve(const TileJob& job, const int32_t* blocks, const int32_t* rows, int count, float* line) {
  // A wide row is taken on a line of its own: its column in the tile, one element every 256 bytes, pushes itself out of
  // the first-level cache.
  const bool narrow = job.channels <= 16;
  const int64_t step = narrow ? kTile : 1;
  __m256 score[kPending];
  const float* c[kPending];
  const float* x[kPending];
  for (int i = 0; i < kPending; ++i) {
    const int at = i < count ? i : 0;
    c[i] = job.packed + blocks[at] * job.packed_stride;
    score[i] = _mm256_loadu_ps(job.half_norm + int64_t{blocks[at]} * kBlock);
    x[i] = narrow ? job.tile + rows[at] : line + i * job.channels;
    if (narrow) continue;
    const float* row = job.x.row(rows[at]);
    for (int64_t k = 0; k < job.channels; k += 16) {
      const auto valid = static_cast<__mmask16>(job.channels - k >= 16 ? 0xffff : (1u << (job.channels - k)) - 1);
      const __m512 v =
          _mm512_sub_ps(_mm512_maskz_loadu_ps(valid, row + k), _mm512_maskz_loadu_ps(valid, job.offset + k));
      _mm512_mask_storeu_ps(line + i * job.channels + k, valid, v);
    }
  }
  for (int64_t k = 0; k < job.channels; ++k)
#pragma GCC unroll 8
    for (int i = 0; i < kPending; ++i)
      score[i] = _mm256_fnmadd_ps(_mm256_load_ps(c[i] + k * kBlock), _mm256_set1_ps(x[i][k * step]), score[i]);
  for (int i = 0; i < count; ++i) {
    __m256 low = _mm256_min_ps(score[i], _mm256_permute2f128_ps(score[i], score[i], 1));
    low = _mm256_min_ps(low, _mm256_permute_ps(low, 0x4e));
    low = _mm256_min_ps(low, _mm256_permute_ps(low, 0xb1));
    const float best = _mm256_cvtss_f32(low);
    if (!(best < job.best[rows[i]])) continue;
    job.best[rows[i]] = best;
    const auto where = static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(score[i], low, _CMP_EQ_OQ)));
    job.best_index[rows[i]] = static_cast<int32_t>(blocks[i] * kBlock + __builtin_ctz(where));
  }
}

}  // namespace

uint32_t bf16_pair(float low, float high) {
  const __m128i both = reinterpret_cast<__m128i>(_mm_cvtneps_pbh(_mm_set_ps(0, 0, high, low)));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(both));
}

bool nearest_bf16(const Bf16Job& job) {
  const TileJob& exact = *job.exact;
  thread_local AlignedVector<uint32_t> pairs;
  thread_local AlignedVector<float> low, line;
  const int64_t own = (exact.channels + 1) / 2, padded = job.tiles ? round_up(own, 16) : own;
  pairs.resize(static_cast<size_t>(padded * kTile));
  std::fill(pairs.begin() + own * kTile, pairs.end(), 0u);
  low.resize(static_cast<size_t>(exact.blocks * kTile));
  line.resize(static_cast<size_t>(kPending * exact.channels));
  alignas(64) float length[kTile], lost[kTile], upper[kTile];
  if (!narrow_tile(exact.tile, exact.channels, pairs.data(), length, lost)) return false;
  const auto how = job.tiles              ? screen_amx
                   : exact.channels == 8  ? screen<4>
                   : exact.channels == 16 ? screen<8>
                                          : screen<0>;
  how(job, pairs.data(), length, lost, low.data(), upper);

  for (int64_t r = 0; r < kTile; ++r) {
    exact.best[r] = std::numeric_limits<float>::infinity();
    exact.best_index[r] = 0;
  }
  __m512 limit[kVectors];
  for (int v = 0; v < kVectors; ++v) limit[v] = _mm512_load_ps(upper + 16 * v);
  int32_t blocks[kPending], rows[kPending];
  int count = 0;
  const uint64_t real = exact.x.rows == kTile ? ~uint64_t{0} : (uint64_t{1} << exact.x.rows) - 1;
  for (int64_t b = 0; b < exact.blocks; ++b) {
    uint64_t rest = 0;
    for (int v = 0; v < kVectors; ++v) {
      const __mmask16 below = _mm512_cmp_ps_mask(_mm512_load_ps(low.data() + b * kTile + 16 * v), limit[v], _CMP_LE_OQ);
      rest |= uint64_t{below} << (16 * v);
    }
    for (rest &= real; rest != 0; rest &= rest - 1) {
      blocks[count] = static_cast<int32_t>(b);
      rows[count] = __builtin_ctzll(rest);
      if (++count < kPending) continue;
      resolve(exact, blocks, rows, count, line.data());
      count = 0;
    }
  }
  if (count > 0) resolve(exact, blocks, rows, count, line.data());
  return true;
}

}  // namespace vqkv::assign
