// g++ 12 takes the undefined starting value of its own intrinsics for a mistake.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <algorithm>
#include <limits>

#include "codec/train/assign_tile.h"

namespace vqkv::assign {
namespace {

constexpr int kVectors = 4;  // kTile / 16 rows

// Eight tiles of 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);

// Configured while a tile of rows is screened, not longer: what is in tiles is saved at every switch of threads.
struct TilesInUse {
  TilesInUse() {
    static constexpr TileConfig config;
    _tile_loadconfig(&config);
  }
  ~TilesInUse() { _tile_release(); }
};

}  // namespace

void screen_amx(const Bf16Job& job, const uint32_t* rows, const float* length, const float* lost, float* low,
                float* upper) {
  const TileJob& exact = *job.exact;
  const int64_t steps = (exact.channels + 31) / 32;
  alignas(64) float products[kVectors][16][16];  // (16 rows of x, codeword, row)
  __m512 bound[kVectors];
  for (__m512& b : bound) b = _mm512_set1_ps(std::numeric_limits<float>::infinity());
  const TilesInUse tiles;
  const uint32_t* c = job.pairs;
  for (int64_t b0 = 0; b0 < exact.blocks; b0 += 2) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    const uint32_t* x = rows;
    for (int64_t s = 0; s < steps; ++s, c += 256, x += 16 * kTile) {
      _tile_loadd(4, c, 64);
      _tile_loadd(5, x, 4 * kTile);
      _tile_dpbf16ps(0, 4, 5);
      _tile_loadd(6, x + 16, 4 * kTile);
      _tile_dpbf16ps(1, 4, 6);
      _tile_loadd(7, x + 32, 4 * kTile);
      _tile_dpbf16ps(2, 4, 7);
      _tile_loadd(5, x + 48, 4 * kTile);
      _tile_dpbf16ps(3, 4, 5);
    }
    _tile_stored(0, products[0], 64);
    _tile_stored(1, products[1], 64);
    _tile_stored(2, products[2], 64);
    _tile_stored(3, products[3], 64);
    for (int64_t b = b0; b < std::min(b0 + 2, exact.blocks); ++b) {
      const float* half_norm = exact.half_norm + b * kBlock;
      const Bf16Bound& e = job.bound[b];
      const __m512 by_length = _mm512_set1_ps(e.by_length), by_loss = _mm512_set1_ps(e.by_loss);
      const __m512 offset = _mm512_set1_ps(e.offset);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        __m512 score[kBlock];
#pragma GCC unroll 8
        for (int i = 0; i < kBlock; ++i)
          score[i] = _mm512_add_ps(_mm512_load_ps(products[v][(b - b0) * kBlock + i]), _mm512_set1_ps(half_norm[i]));
        const __m512 best =
            _mm512_min_ps(_mm512_min_ps(_mm512_min_ps(score[0], score[1]), _mm512_min_ps(score[2], score[3])),
                          _mm512_min_ps(_mm512_min_ps(score[4], score[5]), _mm512_min_ps(score[6], score[7])));
        const __m512 error = _mm512_fmadd_ps(_mm512_load_ps(lost + 16 * v), by_loss,
                                             _mm512_fmadd_ps(_mm512_load_ps(length + 16 * v), by_length, offset));
        _mm512_store_ps(low + b * kTile + 16 * v, _mm512_sub_ps(best, error));
        bound[v] = _mm512_min_ps(bound[v], _mm512_add_ps(best, error));
      }
    }
  }
  for (int v = 0; v < kVectors; ++v) _mm512_store_ps(upper + 16 * v, bound[v]);
}

}  // namespace vqkv::assign
