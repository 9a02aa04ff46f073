// g++ 12 takes the undefined starting value of its own intrinsics for a mistake.
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include "attention/scan.h"

namespace vqkv::scan {
namespace {

// 64 lookups in a table of 256 bytes: two permutes of 128 entries, chosen by the code's top bit.
inline __m512i look(__m512i t0, __m512i t1, __m512i t2, __m512i t3, __m512i code, __mmask64 upper) {
  return _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(t0, code, t1), _mm512_permutex2var_epi8(t2, code, t3));
}

struct Sums {
  __m512i even, odd;  // u16 sums of the even and the odd tokens
  void add(__m512i bytes) {
    even = _mm512_add_epi16(even, _mm512_and_si512(bytes, _mm512_set1_epi16(0xff)));
    odd = _mm512_add_epi16(odd, _mm512_srli_epi16(bytes, 8));
  }
};

inline __m512i table(const uint8_t* t, int i) { return _mm512_load_si512(t + 64 * i); }

// Sums of 16 neighbouring tokens as 32-bit numbers; part in [0, 4).
inline __m512i widen(const Sums& s, int part) {
  // Interleave even and odd lanes back into token order within 128-bit lanes, then across.
  const __m512i index_low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35,
                                             3, 34, 2, 33, 1, 32, 0);
  const __m512i index_high = _mm512_add_epi16(index_low, _mm512_set1_epi16(16));
  const __m512i half = _mm512_permutex2var_epi16(s.even, part < 2 ? index_low : index_high, s.odd);
  const __m256i quarter = (part & 1) == 0 ? _mm512_castsi512_si256(half) : _mm512_extracti64x4_epi64(half, 1);
  return _mm512_cvtepu16_epi32(quarter);
}

}  // namespace

void fixed_vbmi(const FixedTables& tables, const uint8_t* codes, int64_t slots, float* out) {
  Sums low{_mm512_setzero_si512(), _mm512_setzero_si512()}, high = low;
  for (int64_t s = 0; s < slots; ++s) {
    const uint8_t* l = tables.low_byte.data() + s * kEntries;
    const uint8_t* h = tables.high_byte.data() + s * kEntries;
    const __m512i code = _mm512_loadu_si512(codes + s * kRun);
    const __mmask64 upper = _mm512_movepi8_mask(code);
    low.add(look(table(l, 0), table(l, 1), table(l, 2), table(l, 3), code, upper));
    high.add(look(table(h, 0), table(h, 1), table(h, 2), table(h, 3), code, upper));
  }
  const __m512 base = _mm512_set1_ps(tables.base), step = _mm512_set1_ps(tables.step);
  for (int part = 0; part < 4; ++part) {
    const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(widen(high, part), 8), widen(low, part));
    _mm512_storeu_ps(out + 16 * part, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), step, base));
  }
}

void coarse_vbmi(const FixedTables& tables, const uint8_t* codes, int64_t slots, uint16_t* sums) {
  Sums high{_mm512_setzero_si512(), _mm512_setzero_si512()};
  for (int64_t s = 0; s < slots; ++s) {
    const uint8_t* h = tables.high_byte.data() + s * kEntries;
    const __m512i code = _mm512_loadu_si512(codes + s * kRun);
    high.add(look(table(h, 0), table(h, 1), table(h, 2), table(h, 3), code, _mm512_movepi8_mask(code)));
  }
  for (int part = 0; part < 4; ++part)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + 16 * part), _mm512_cvtepi32_epi16(widen(high, part)));
}

}  // namespace vqkv::scan
