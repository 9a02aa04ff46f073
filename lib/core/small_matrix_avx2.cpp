#include "core/small_matrix_avx2.h"

#include <immintrin.h>

namespace vqkv::kernels {

void transpose_8x8_avx2(const float* in, int64_t in_stride, float* out, int64_t out_stride, bool add) {
  __m256 r[8], s[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(in + i * in_stride);
  for (int i = 0; i < 8; i += 2) {
    s[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    s[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(s[i], s[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(s[i], s[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    s[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
    s[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
  }
  for (int i = 0; i < 8; ++i) {
    float* to = out + i * out_stride;
    _mm256_storeu_ps(to, add ? _mm256_add_ps(_mm256_loadu_ps(to), s[i]) : s[i]);
  }
}

void transpose_8x4_avx2(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
  for (int64_t i = 0; i < 8; i += 4) {
    __m128 v[4];
    for (int64_t j = 0; j < 4; ++j) v[j] = _mm_loadu_ps(in + (i + j) * in_stride);
    _MM_TRANSPOSE4_PS(v[0], v[1], v[2], v[3]);
    for (int64_t j = 0; j < 4; ++j) _mm_storeu_ps(out + j * out_stride + i, v[j]);
  }
}

}  // namespace vqkv::kernels
