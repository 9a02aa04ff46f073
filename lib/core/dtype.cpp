#include "core/dtype.h"

#include <fmt/format.h>
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <type_traits>

#include "core/cpu.h"
#include "core/error.h"
#include "core/names.h"

namespace vqkv {
namespace {

struct DTypeRow {
  DType type;
  std::string_view name;
  size_t size;
};
constexpr std::array<DTypeRow, 7> kTypes{{{DType::kF32, "f32", 4},
                                          {DType::kF16, "f16", 2},
                                          {DType::kBF16, "bf16", 2},
                                          {DType::kF8E5M2, "f8e5m2", 1},
                                          {DType::kU8, "u8", 1},
                                          {DType::kU16, "u16", 2},
                                          {DType::kI32, "i32", 4}}};

const DTypeRow& row_of(DType t) {
  for (const auto& r : kTypes)
    if (r.type == t) return r;
  fail_internal("unknown dtype");
}

__attribute__((target("avx2,f16c"))) int64_t widen_f16_avx2(const f16* in, float* out, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
  return i;
}

__attribute__((target("avx2,f16c"))) int64_t narrow_f16_avx2(const float* in, f16* out, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  return i;
}

__attribute__((target("avx2"))) int64_t widen_bf16_avx2(const bf16* in, float* out, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i)));
    _mm256_storeu_ps(out + i, _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16)));
  }
  return i;
}

__attribute__((target("avx2"))) int64_t narrow_bf16_avx2(const float* in, bf16* out, int64_t n) {
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

}  // namespace

size_t dtype_size(DType t) { return row_of(t).size; }
std::string_view dtype_name(DType t) { return row_of(t).name; }
DType dtype_from_name(std::string_view name) {
  std::vector<std::string> known;
  for (const auto& r : kTypes) {
    if (r.name == name) return r.type;
    known.emplace_back(r.name);
  }
  fail_unknown("dtype", std::string(name), known);
}

void to_float(const f16* in, float* out, int64_t n) {
  int64_t i = cpu_features().avx2 ? widen_f16_avx2(in, out, n) : 0;
  for (; i < n; ++i) out[i] = to_float(in[i]);
}
void to_f16(const float* in, f16* out, int64_t n) {
  int64_t i = cpu_features().avx2 ? narrow_f16_avx2(in, out, n) : 0;
  for (; i < n; ++i) out[i] = to_f16(in[i]);
}
void to_float(const bf16* in, float* out, int64_t n) {
  int64_t i = cpu_features().avx2 ? widen_bf16_avx2(in, out, n) : 0;
  for (; i < n; ++i) out[i] = to_float(in[i]);
}
void to_bf16(const float* in, bf16* out, int64_t n) {
  int64_t i = cpu_features().avx2 ? narrow_bf16_avx2(in, out, n) : 0;
  for (; i < n; ++i) out[i] = to_bf16(in[i]);
}

namespace {

// There and back by the conversions of whole arrays, which use what the processor has.
template <class T>
void round_through(float* values, int64_t n) {
  constexpr int64_t kPiece = 1024;
  T narrow[kPiece];
  for (int64_t at = 0; at < n; at += kPiece) {
    const int64_t m = std::min(kPiece, n - at);
    if constexpr (std::is_same_v<T, f16>)
      to_f16(values + at, narrow, m);
    else
      to_bf16(values + at, narrow, m);
    to_float(narrow, values + at, m);
  }
}

}  // namespace

void round_to(DType t, float* values, int64_t n) {
  switch (t) {
    case DType::kF32:
      return;
    case DType::kF16:
      return round_through<f16>(values, n);
    case DType::kBF16:
      return round_through<bf16>(values, n);
    case DType::kF8E5M2:  // the upper byte of a half, to nearest even
      for (int64_t i = 0; i < n; ++i) {
        const uint32_t h = to_f16(values[i]).bits;
        if ((h & 0x7fffu) > 0x7c00u) continue;  // NaN stays NaN
        values[i] = to_float(f16{static_cast<uint16_t>((h + 0x7fu + ((h >> 8) & 1u)) & 0xff00u)});
      }
      return;
    default:
      fail_internal(fmt::format("round_to: {} is not a floating-point cache type", dtype_name(t)));
  }
}

}  // namespace vqkv
