#include <immintrin.h>

#include "attention/scan_cpu.h"

namespace vqkv::scan {
namespace {

// 64 codes, and what chooses among the slices of a table: bits 4 to 7 of each code, each moved to the top of its byte.
struct Codes {
  __m256i low[2], bit[4][2];
  explicit Codes(const uint8_t* codes) {
    for (int i = 0; i < 2; ++i) {
      const __m256i c = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + 32 * i));
      low[i] = _mm256_and_si256(c, _mm256_set1_epi8(0x0f));
      bit[0][i] = _mm256_slli_epi16(c, 3);
      bit[1][i] = _mm256_slli_epi16(c, 2);
      bit[2][i] = _mm256_slli_epi16(c, 1);
      bit[3][i] = c;
    }
  }
};

struct Bytes {
  __m256i half[2];
};

// 64 lookups in the first 16 << L bytes of a table: a shuffle a slice of 16, then a tree of blends.
template <int L>
inline Bytes look(const uint8_t* table, const Codes& c) {
  if constexpr (L == 0) {
    const __m256i t = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table)));
    return {{_mm256_shuffle_epi8(t, c.low[0]), _mm256_shuffle_epi8(t, c.low[1])}};
  } else {
    const Bytes a = look<L - 1>(table, c), b = look<L - 1>(table + (8 << L), c);
    return {{_mm256_blendv_epi8(a.half[0], b.half[0], c.bit[L - 1][0]),
             _mm256_blendv_epi8(a.half[1], b.half[1], c.bit[L - 1][1])}};
  }
}

struct Sums {
  __m256i both[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()}, odd[2] = {both[0], both[0]};
  void add(const Bytes& b) {
    for (int i = 0; i < 2; ++i) {
      both[i] = _mm256_add_epi16(both[i], b.half[i]);
      odd[i] = _mm256_add_epi16(odd[i], _mm256_srli_epi16(b.half[i], 8));
    }
  }
  // Sums of tokens [32 i + 8 part, + 8), modulo 2^16, which they stay below; part in [0, 4).
  __m256i widen(int i, int part) const {
    const __m256i even = _mm256_sub_epi16(both[i], _mm256_slli_epi16(odd[i], 8));
    const __m256i pairs = (part & 1) == 0 ? _mm256_unpacklo_epi16(even, odd[i]) : _mm256_unpackhi_epi16(even, odd[i]);
    return _mm256_cvtepu16_epi32(part < 2 ? _mm256_castsi256_si128(pairs) : _mm256_extracti128_si256(pairs, 1));
  }
};

inline void store(float* out, __m256i sum, float step, float base) {
  _mm256_storeu_ps(out, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(step), _mm256_set1_ps(base)));
}

template <int L>
void fixed_run(const FixedTables& tables, const uint8_t* codes, int64_t slots, float* out) {
  Sums low, high;
  for (int64_t s = 0; s < slots; ++s) {
    const Codes c(codes + s * kRun);
    low.add(look<L>(tables.low_byte.data() + s * kEntries, c));
    high.add(look<L>(tables.high_byte.data() + s * kEntries, c));
  }
  for (int i = 0; i < 2; ++i)
    for (int part = 0; part < 4; ++part)
      store(out + 32 * i + 8 * part, _mm256_add_epi32(_mm256_slli_epi32(high.widen(i, part), 8), low.widen(i, part)),
            tables.step, tables.base);
}

template <int L>
void bytes_run(const ByteTables& tables, const uint8_t* codes, int64_t slots, float* out) {
  Sums sums;
  for (int64_t s = 0; s < slots; ++s) sums.add(look<L>(tables.bytes.data() + s * kEntries, Codes(codes + s * kRun)));
  for (int i = 0; i < 2; ++i)
    for (int part = 0; part < 4; ++part) store(out + 32 * i + 8 * part, sums.widen(i, part), tables.step, tables.base);
}

}  // namespace

void fixed_avx2(const FixedTables& tables, const uint8_t* const* runs, int64_t count, int64_t slots, float* out) {
  const auto run = tables.entries <= 16    ? fixed_run<0>
                   : tables.entries <= 32  ? fixed_run<1>
                   : tables.entries <= 64  ? fixed_run<2>
                   : tables.entries <= 128 ? fixed_run<3>
                                           : fixed_run<4>;
  for (int64_t n = 0; n < count; ++n) run(tables, runs[n], slots, out + n * kRun);
}

void bytes_avx2(const ByteTables& tables, const uint8_t* const* runs, int64_t count, int64_t slots, float* out) {
  const auto run = tables.entries <= 16    ? bytes_run<0>
                   : tables.entries <= 32  ? bytes_run<1>
                   : tables.entries <= 64  ? bytes_run<2>
                   : tables.entries <= 128 ? bytes_run<3>
                                           : bytes_run<4>;
  for (int64_t n = 0; n < count; ++n) run(tables, runs[n], slots, out + n * kRun);
}

}  // namespace vqkv::scan
