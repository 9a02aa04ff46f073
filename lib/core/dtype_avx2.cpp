#include "core/dtype_avx2.h"

#include <immintrin.h>

namespace vqkv {

namespace {

inline __m256 widen(const f16* in) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in))); }
inline __m256 widen(const bf16* in) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

template <class T>
void widen_rows(const T* in, int64_t in_stride, float* out, int64_t out_stride, int64_t rows, int64_t n) {
  for (int64_t r = 0; r < rows; ++r, in += in_stride, out += out_stride)
    for (int64_t i = 0; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, widen(in + i));
}

}  // namespace

void widen_avx2(const f16* in, int64_t in_stride, float* out, int64_t out_stride, int64_t rows, int64_t n) {
  widen_rows(in, in_stride, out, out_stride, rows, n);
}
void widen_avx2(const bf16* in, int64_t in_stride, float* out, int64_t out_stride, int64_t rows, int64_t n) {
  widen_rows(in, in_stride, out, out_stride, rows, n);
}

int64_t narrow_f16_avx2(const float* in, f16* out, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  return i;
}

int64_t narrow_bf16_avx2(const float* in, bf16* out, int64_t n) {
  const __m256i one = _mm256_set1_epi32(1), bias = _mm256_set1_epi32(0x7fff), magnitude = _mm256_set1_epi32(0x7fffffff);
  const __m256i infinity = _mm256_set1_epi32(0x7f800000), quiet = _mm256_set1_epi32(0x40);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    __m256i half[2];
    for (int k = 0; k < 2; ++k) {
      const __m256i u = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i + 8 * k));
      const __m256i high = _mm256_srli_epi32(u, 16);
      const __m256i rounded =
          _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(bias, _mm256_and_si256(high, one))), 16);
      const __m256i nan = _mm256_cmpgt_epi32(_mm256_and_si256(u, magnitude), infinity);
      half[k] = _mm256_blendv_epi8(rounded, _mm256_or_si256(high, quiet), nan);
    }
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(half[0], half[1]), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), packed);
  }
  return i;
}

}  // namespace vqkv
