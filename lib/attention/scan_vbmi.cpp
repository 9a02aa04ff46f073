// g++ 12 takes the undefined starting value of its own intrinsics for a mistake.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "attention/scan_cpu.h"

namespace vqkv::scan {
namespace {

// 64 lookups in a table of 256 bytes: two permutes of 128 entries, chosen by the code's top bit.
inline __m512i look(__m512i t0, __m512i t1, __m512i t2, __m512i t3, __m512i code, __mmask64 upper) {
  return _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(t0, code, t1), _mm512_permutex2var_epi8(t2, code, t3));
}

struct Sums {
  __m512i both = _mm512_setzero_si512(), odd = _mm512_setzero_si512();  // u16: even + 256 * odd tokens, and odd tokens
  void add(__m512i bytes) {
    both = _mm512_add_epi16(both, bytes);
    // The odd byte by a multiply-add with (0, 1): shifts wait for the ports that the permutes keep busy.
    odd = _mm512_add_epi16(odd, _mm512_maddubs_epi16(bytes, _mm512_set1_epi16(0x0100)));
  }
  // Modulo 2^16, which the sums stay below.
  __m512i even() const { return _mm512_sub_epi16(both, _mm512_slli_epi16(odd, 8)); }
};

inline __m512i table(const uint8_t* t, int i) { return _mm512_load_si512(t + 64 * i); }

// Sums of 16 neighbouring tokens as 32-bit numbers; part in [0, 4).
inline __m512i widen(const Sums& s, int part) {
  // Interleave even and odd lanes back into token order within 128-bit lanes, then across.
  const __m512i index_low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                             37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i index_high = _mm512_add_epi16(index_low, _mm512_set1_epi16(16));
  const __m512i half = _mm512_permutex2var_epi16(s.even(), part < 2 ? index_low : index_high, s.odd);
  const __m256i quarter = (part & 1) == 0 ? _mm512_castsi512_si256(half) : _mm512_extracti64x4_epi64(half, 1);
  return _mm512_cvtepu16_epi32(quarter);
}

}  // namespace

namespace {

// N runs share the loads of the tables: 16 sums, 8 table registers and the codes fill the register file at N = 4.
template <int N>
void fixed_block(const FixedTables& tables, const uint8_t* const* runs, int64_t slots, float* out) {
  Sums low[N], high[N];
  for (int64_t s = 0; s < slots; ++s) {
    const uint8_t* l = tables.low_byte.data() + s * kEntries;
    const uint8_t* h = tables.high_byte.data() + s * kEntries;
    const __m512i l0 = table(l, 0), l1 = table(l, 1), l2 = table(l, 2), l3 = table(l, 3);
    const __m512i h0 = table(h, 0), h1 = table(h, 1), h2 = table(h, 2), h3 = table(h, 3);
    for (int n = 0; n < N; ++n) {
      const __m512i code = _mm512_loadu_si512(runs[n] + s * kRun);
      const __mmask64 upper = _mm512_movepi8_mask(code);
      low[n].add(look(l0, l1, l2, l3, code, upper));
      high[n].add(look(h0, h1, h2, h3, code, upper));
    }
  }
  const __m512 base = _mm512_set1_ps(tables.base), step = _mm512_set1_ps(tables.step);
  for (int n = 0; n < N; ++n)
    for (int part = 0; part < 4; ++part) {
      const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(widen(high[n], part), 8), widen(low[n], part));
      _mm512_storeu_ps(out + n * kRun + 16 * part, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), step, base));
    }
}

template <int N>
void bytes_block(const ByteTables& tables, const uint8_t* const* runs, int64_t slots, float* out) {
  Sums sums[N];
  for (int64_t s = 0; s < slots; ++s) {
    const uint8_t* t = tables.bytes.data() + s * kEntries;
    const __m512i t0 = table(t, 0), t1 = table(t, 1), t2 = table(t, 2), t3 = table(t, 3);
    for (int n = 0; n < N; ++n) {
      const __m512i code = _mm512_loadu_si512(runs[n] + s * kRun);
      sums[n].add(look(t0, t1, t2, t3, code, _mm512_movepi8_mask(code)));
    }
  }
  const __m512 base = _mm512_set1_ps(tables.base), step = _mm512_set1_ps(tables.step);
  for (int n = 0; n < N; ++n)
    for (int part = 0; part < 4; ++part)
      _mm512_storeu_ps(out + n * kRun + 16 * part,
                       _mm512_fmadd_ps(_mm512_cvtepi32_ps(widen(sums[n], part)), step, base));
}

}  // namespace

void fixed_vbmi(const FixedTables& tables, const uint8_t* const* runs, int64_t count, int64_t slots, float* out) {
  for (; count >= 4; count -= 4, runs += 4, out += 4 * kRun) fixed_block<4>(tables, runs, slots, out);
  for (; count > 0; --count, ++runs, out += kRun) fixed_block<1>(tables, runs, slots, out);
}

void bytes_vbmi(const ByteTables& tables, const uint8_t* const* runs, int64_t count, int64_t slots, float* out) {
  for (; count >= 4; count -= 4, runs += 4, out += 4 * kRun) bytes_block<4>(tables, runs, slots, out);
  for (; count > 0; --count, ++runs, out += kRun) bytes_block<1>(tables, runs, slots, out);
}

}  // namespace vqkv::scan
