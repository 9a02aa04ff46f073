#include "attention/packed_levels_cpu.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <type_traits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "attention/packed_levels_cpu.cpp"
#include <hwy/foreach_target.h>  // compiles this file once per target
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace vqkv::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using D = hn::CappedTag<float, 16>;
using DU = hn::RebindToUnsigned<D>;
using V = hn::Vec<D>;
using VU = hn::Vec<DU>;
constexpr int64_t kLanes = static_cast<int64_t>(hn::MaxLanes(D()));
constexpr int kTogether = 2;  // vectors of codes
static_assert(kLevelRun % (kTogether * kLanes) == 0);

// Whether a permute finds the levels of a vector of codes: 16 or 8 entries, chosen by the lowest bits of an index
// alone, so that what lies above a code needs no mask.
#undef VQKV_NIBBLES
#if HWY_TARGET <= HWY_AVX3
#define VQKV_NIBBLES 1
constexpr int kPermuteBits = 4;
#else
#define VQKV_NIBBLES 0
constexpr int kPermuteBits = HWY_TARGET <= HWY_AVX2 ? 3 : 0;
#endif
HWY_INLINE V permute(V table, [[maybe_unused]] VU index) {
#if HWY_TARGET <= HWY_AVX2
  using Index = decltype(hn::IndicesFromVec(D(), index));  // made by hand: IndicesFromVec asserts that bits above are 0
  return hn::TableLookupLanes(table, Index{index.raw});
#else
  return table;
#endif
}

HWY_INLINE uint32_t word(const uint8_t* at) {
  uint32_t w;
  std::memcpy(&w, at, sizeof w);
  return w;
}

#if VQKV_NIBBLES

constexpr uint64_t kEvenPairs = 0x3333333333333333;  // of bits
alignas(64) constexpr uint64_t kRight[8] = {0, 2, 0, 2, 0, 2, 0, 2}, kLeft[8] = {2, 0, 2, 0, 2, 0, 2, 0};

// What four bits can add up to.
template <int kBits>
struct Nibble {
  static constexpr int kCodes = 4 / kBits;
  V level[kCodes];
  HWY_INLINE explicit Nibble(const PackedLevels& p) {
    for (int k = 0; k < kCodes; ++k) level[k] = hn::LoadU(D(), p.level[k]);
  }
  // The sum of f[k] * level(code k) for each of the 16.
  HWY_INLINE V sums(const float* f) const {
    const D d;
    V s = hn::Mul(hn::Set(d, f[0]), level[0]);
    for (int k = 1; k < kCodes; ++k) s = hn::MulAdd(hn::Set(d, f[k]), level[k], s);
    return s;
  }
};

// A run of 4 / kBits channels as nibbles of one token each: 32 of them in two words. Channels past `have` count as
// code 0.
template <int kBits>
HWY_INLINE void turn_nibbles(const uint8_t* codes, int64_t stride, int64_t have, uint64_t* out) {
  if constexpr (kBits == 4) {
    std::memcpy(out, codes, kTogether * sizeof *out);
  } else if constexpr (kBits == 2) {
    uint64_t a, b = 0;
    std::memcpy(&a, codes, sizeof a);
    if (have > 1) std::memcpy(&b, codes + stride, sizeof b);
    out[0] = (a & kEvenPairs) | (b & kEvenPairs) << 2;
    out[1] = (a >> 2 & kEvenPairs) | (b & ~kEvenPairs);
  } else {
    constexpr uint32_t kOne = 0x11111111;
    uint32_t a[4] = {}, n[4];
    for (int64_t k = 0; k < std::min<int64_t>(have, 4); ++k) a[k] = word(codes + k * stride);
    for (int t = 0; t < 4; ++t)
      n[t] = (a[0] >> t & kOne) | (a[1] >> t & kOne) << 1 | (a[2] >> t & kOne) << 2 | (a[3] >> t & kOne) << 3;
    for (int j = 0; j < kTogether; ++j) out[j] = n[2 * j] | uint64_t{n[2 * j + 1]} << 32;
  }
}

// The same of `channels` channels, two words after two words.
template <int kBits>
HWY_INLINE void turn_channels(const uint8_t* codes, int64_t stride, int64_t channels, uint64_t* out) {
  constexpr int64_t kCodes = 4 / kBits;
  int64_t c = 0;
  if (kBits == 2 && stride == 16) {
    // Eight channels: their words are every other one of 16. What follows the last one is not read.
    const hn::Repartition<uint64_t, DU> d;
    const auto first = hn::Set(d, kEvenPairs);
    const auto right = hn::LoadU(d, kRight), left = hn::LoadU(d, kLeft);
    using V64 = hn::Vec<decltype(d)>;
    for (; c + 8 < channels; c += 8) {
      const auto* at = reinterpret_cast<const uint64_t*>(codes + c * stride);
      const V64 own = hn::ConcatEven(d, hn::LoadU(d, at + 8), hn::LoadU(d, at));
      const V64 a = hn::Shr(hn::InterleaveLower(d, own, own), right);
      const V64 b = hn::Shl(hn::InterleaveUpper(d, own, own), left);
      hn::StoreU(hn::Or(hn::And(a, first), hn::AndNot(first, b)), d, out + c);
    }
  }
  for (; c < channels; c += kCodes)
    turn_nibbles<kBits>(codes + c * stride, stride, channels - c, out + c / kCodes * kTogether);
}

// Where score_rows has token t of a run: 16 * vector + lane. Nibble n of the lower and of the upper half of a word
// are in lanes 2 n and 2 n + 1.
template <int kBits>
constexpr uint32_t lane_of(int t) {
  const int word = kBits == 4 ? t / 8 : kBits == 2 ? t / 16 + t % 2 * 2 : t % 4;  // 32-bit words of both vectors
  const int nibble = kBits == 4 ? t % 8 : kBits == 2 ? t % 16 / 2 : t / 4;
  return static_cast<uint32_t>(word / 2 * 16 + 2 * nibble + word % 2);
}

template <int kBits, int R>
HWY_INLINE void score_rows(const PackedLevels& p, const float* HWY_RESTRICT q, int64_t q_stride, int64_t channels,
                           const float* base, float* HWY_RESTRICT out, int64_t out_stride) {
  const D d;
  const DU du;
  constexpr int64_t kCodes = Nibble<kBits>::kCodes;
  const Nibble<kBits> nibble(p);
  const VU shift = hn::ShiftLeft<2>(hn::ShiftRight<1>(hn::Iota(du, 0)));
  V sum[R][kTogether];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < kTogether; ++j) sum[r][j] = hn::Set(d, base[r]);
  constexpr int64_t kAtOnce = 128;  // channels
  const hn::Repartition<uint64_t, DU> d64;
  uint64_t words[kAtOnce * kTogether];
  for (int64_t low = 0; low < channels; low += kAtOnce) {
    const int64_t high = std::min(channels, low + kAtOnce);
    turn_channels<kBits>(p.codes + low * p.stride, p.stride, high - low, words);
    const uint64_t* at = words;
    for (int64_t c = low; c < high; c += kCodes, at += kTogether) {
      VU index[kTogether];
      for (int j = 0; j < kTogether; ++j) index[j] = hn::Shr(hn::BitCast(du, hn::Set(d64, at[j])), shift);
      for (int r = 0; r < R; ++r) {
        const V table = nibble.sums(q + r * q_stride + c);
        for (int j = 0; j < kTogether; ++j) sum[r][j] = hn::Add(sum[r][j], permute(table, index[j]));
      }
    }
  }
  static constexpr auto kLaneOf = [] {
    std::array<uint32_t, kLevelRun> lanes{};
    for (int t = 0; t < kLevelRun; ++t) lanes[static_cast<size_t>(t)] = lane_of<kBits>(t);
    return lanes;
  }();
  for (int64_t t = 0; t < kLevelRun; t += kLanes) {
    const VU lane = hn::LoadU(du, kLaneOf.data() + t);
    const hn::RebindToSigned<D> di;
    const auto second = hn::RebindMask(d, hn::Gt(hn::BitCast(di, lane), hn::Set(di, kLanes - 1)));
    for (int r = 0; r < R; ++r)
      hn::StoreU(hn::IfThenElse(second, permute(sum[r][1], lane), permute(sum[r][0], lane)), d,
                 out + r * out_stride + t);
  }
}

// N vectors of channels.
template <int kBits, int R, int N>
HWY_INLINE void sum_block(const PackedLevels& p, const uint32_t* HWY_RESTRICT words, int64_t stride,
                          const float* HWY_RESTRICT w, int64_t w_stride, int64_t first, int64_t end,
                          float* HWY_RESTRICT y, int64_t y_stride) {
  const D d;
  const DU du;
  constexpr int64_t kWord = 32 / kBits, kCodes = Nibble<kBits>::kCodes;
  const Nibble<kBits> nibble(p);
  V sum[R][N];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < N; ++j) sum[r][j] = hn::LoadU(d, y + r * y_stride + j * kLanes);
  for (int64_t t = first / kCodes * kCodes; t < end;) {
    const int64_t at = t / kWord, stop = std::min(end, (at + 1) * kWord);
    VU left[N];
    for (int j = 0; j < N; ++j)
      left[j] =
          hn::ShiftRightSame(hn::LoadU(du, words + at * stride + j * kLanes), static_cast<int>(t % kWord * kBits));
    for (; t < stop; t += kCodes) {
      for (int r = 0; r < R; ++r) {
        const V table = nibble.sums(w + r * w_stride + t);
        for (int j = 0; j < N; ++j) sum[r][j] = hn::Add(sum[r][j], permute(table, left[j]));
      }
      for (int j = 0; j < N; ++j) left[j] = hn::ShiftRight<4>(left[j]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < N; ++j) hn::StoreU(sum[r][j], d, y + r * y_stride + j * kLanes);
}

#else

// Levels of a vector of codes, each at the bottom of its lane with other bits above.
template <int kBits>
struct Levels {
  const PackedLevels& p;
  V table;
  HWY_INLINE explicit Levels(const PackedLevels& of) : p(of), table(hn::LoadU(D(), of.level[0])) {}
  HWY_INLINE V of(VU codes) const {
    if constexpr (kBits <= kPermuteBits) return permute(table, codes);
    const D d;
    const hn::RebindToSigned<D> di;
    const auto code = hn::BitCast(di, hn::And(codes, hn::Set(DU(), (1u << kBits) - 1)));
    if (p.even) return hn::Sub(hn::ConvertTo(d, code), hn::Set(d, p.offset));
    return hn::GatherIndex(d, p.level[0], code);
  }
};

template <int kBits, int R>
HWY_INLINE void score_rows(const PackedLevels& p, const float* HWY_RESTRICT q, int64_t q_stride, int64_t channels,
                           const float* base, float* HWY_RESTRICT out, int64_t out_stride) {
  const D d;
  const DU du;
  static_assert(kLanes * kBits <= 32);
  const Levels<kBits> levels(p);
  const VU lane = hn::Mul(hn::Iota(du, 0), hn::Set(du, kBits));
  for (int64_t t = 0; t < kLevelRun; t += kTogether * kLanes) {
    V sum[R][kTogether];
    VU shift[kTogether];
    for (int j = 0; j < kTogether; ++j) {
      shift[j] = hn::Add(lane, hn::Set(du, static_cast<uint32_t>((t + j * kLanes) * kBits % 32)));
      for (int r = 0; r < R; ++r) sum[r][j] = hn::Set(d, base[r]);
    }
    const uint8_t* codes = p.codes;
    for (int64_t c = 0; c < channels; ++c, codes += p.stride) {
      V key[kTogether];
      for (int j = 0; j < kTogether; ++j)
        key[j] = levels.of(hn::Shr(hn::Set(du, word(codes + (t + j * kLanes) * kBits / 32 * 4)), shift[j]));
      for (int r = 0; r < R; ++r) {
        const V x = hn::Set(d, q[r * q_stride + c]);
        for (int j = 0; j < kTogether; ++j) sum[r][j] = hn::MulAdd(x, key[j], sum[r][j]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < kTogether; ++j) hn::StoreU(sum[r][j], d, out + r * out_stride + t + j * kLanes);
  }
}

template <int kBits, int R, int N>
HWY_INLINE void sum_block(const PackedLevels& p, const uint32_t* HWY_RESTRICT words, int64_t stride,
                          const float* HWY_RESTRICT w, int64_t w_stride, int64_t first, int64_t end,
                          float* HWY_RESTRICT y, int64_t y_stride) {
  const D d;
  const DU du;
  constexpr int64_t kWord = 32 / kBits;
  const Levels<kBits> levels(p);
  V sum[R][N];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < N; ++j) sum[r][j] = hn::LoadU(d, y + r * y_stride + j * kLanes);
  for (int64_t t = first; t < end;) {
    const int64_t at = t / kWord, stop = std::min(end, (at + 1) * kWord);
    VU left[N];
    for (int j = 0; j < N; ++j)
      left[j] =
          hn::ShiftRightSame(hn::LoadU(du, words + at * stride + j * kLanes), static_cast<int>(t % kWord * kBits));
    for (; t < stop; ++t) {
      V value[N];
      for (int j = 0; j < N; ++j) {
        value[j] = levels.of(left[j]);
        left[j] = hn::ShiftRight<kBits>(left[j]);
      }
      for (int r = 0; r < R; ++r) {
        const V x = hn::Set(d, w[r * w_stride + t]);
        for (int j = 0; j < N; ++j) sum[r][j] = hn::MulAdd(x, value[j], sum[r][j]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < N; ++j) hn::StoreU(sum[r][j], d, y + r * y_stride + j * kLanes);
}

#endif

template <int N>
using Number = std::integral_constant<int, N>;

// body(Number<bits>).
template <class Body>
HWY_INLINE void for_bits(int bits, Body&& body) {
  if (bits == 1)
    body(Number<1>());
  else if (bits == 2)
    body(Number<2>());
  else
    body(Number<4>());
}

// body(Number<n>, row) for up to four rows at a time.
template <class Body>
HWY_INLINE void for_rows(int64_t rows, Body&& body) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) body(Number<4>(), r);
  if (rows - r == 3) body(Number<3>(), r);
  if (rows - r == 2) body(Number<2>(), r);
  if (rows - r == 1) body(Number<1>(), r);
}

void ScoreLevels(const PackedLevels& p, const float* q, int64_t q_stride, int64_t rows, int64_t channels,
                 const float* base, float* out, int64_t out_stride) {
  for_bits(p.bits, [&](auto bits) {
    for_rows(rows, [&](auto n, int64_t r) {
      score_rows<bits.value, n.value>(p, q + r * q_stride, q_stride, channels, base + r, out + r * out_stride,
                                      out_stride);
    });
  });
}

void TurnWords(const PackedLevels& p, int64_t channels, int64_t count, uint32_t* words, int64_t stride) {
  const DU du;
  int64_t c = 0;
  if (count == 4 && p.stride == 16)  // 64 tokens of 2 bits: channels beside each other
    for (; c + kLanes <= channels; c += kLanes) {
      VU w[4];
      hn::LoadInterleaved4(du, reinterpret_cast<const uint32_t*>(p.codes + c * p.stride), w[0], w[1], w[2], w[3]);
      for (int i = 0; i < 4; ++i) hn::StoreU(w[i], du, words + i * stride + c);
    }
  for (; c < stride; ++c)
    for (int64_t i = 0; i < count; ++i) words[i * stride + c] = c < channels ? word(p.codes + c * p.stride + 4 * i) : 0;
}

void SumLevels(const PackedLevels& p, const uint32_t* words, int64_t stride, const float* w, int64_t w_stride,
               int64_t rows, int64_t first, int64_t end, int64_t channels, float* y, int64_t y_stride) {
  for_bits(p.bits, [&](auto bits) {
    for_rows(rows, [&](auto n, int64_t r) {
      int64_t c = 0;
      const auto block = [&](auto vectors) {
        sum_block<bits.value, n.value, vectors.value>(p, words + c, stride, w + r * w_stride, w_stride, first, end,
                                                      y + r * y_stride + c, y_stride);
        c += vectors.value * kLanes;
      };
      while (c + kTogether * kLanes <= channels) block(Number<kTogether>());
      while (c < channels) block(Number<1>());
    });
  });
}

// The first n < kLanes numbers, then zeros: what a sum has in its lanes does not depend on where its row ends.
HWY_INLINE V load_some(const float* from, int64_t n) {
  const D d;
#if HWY_TARGET <= HWY_AVX2
  return hn::MaskedLoad(hn::FirstN(d, static_cast<size_t>(n)), d, from);
#else
  float some[kLanes] = {};
  std::copy_n(from, n, some);
  return hn::LoadU(d, some);
#endif
}

void FoldLine(const float* x, int64_t x_stride, int64_t rows, const float* scale, const float* zero, int64_t n,
              float* out, int64_t out_stride, float* sums) {
  for_rows(rows, [&](auto count, int64_t row) {
    constexpr int R = count.value;
    const D d;
    const float* from = x + row * x_stride;
    float* to = out + row * out_stride;
    V sum[R];
    for (int r = 0; r < R; ++r) sum[r] = hn::Zero(d);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      const V f = hn::LoadU(d, scale + i), z = hn::LoadU(d, zero + i);
      for (int r = 0; r < R; ++r) {
        const V v = hn::LoadU(d, from + r * x_stride + i);
        hn::StoreU(hn::Mul(v, f), d, to + r * out_stride + i);
        sum[r] = hn::MulAdd(v, z, sum[r]);
      }
    }
    if (i < n) {
      const V f = load_some(scale + i, n - i), z = load_some(zero + i, n - i);
      for (int r = 0; r < R; ++r) {
        const V v = load_some(from + r * x_stride + i, n - i);
        hn::StoreU(hn::Mul(v, f), d, to + r * out_stride + i);
        sum[r] = hn::MulAdd(v, z, sum[r]);
      }
    }
    for (int r = 0; r < R; ++r) sums[row + r] += hn::GetLane(hn::SumOfLanes(d, sum[r]));
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace vqkv::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace vqkv::kernels {

HWY_EXPORT(ScoreLevels);
HWY_EXPORT(TurnWords);
HWY_EXPORT(SumLevels);
HWY_EXPORT(FoldLine);

void score_levels(const PackedLevels& p, const float* q, int64_t q_stride, int64_t rows, int64_t channels,
                  const float* base, float* out, int64_t out_stride) {
  HWY_DYNAMIC_DISPATCH(ScoreLevels)(p, q, q_stride, rows, channels, base, out, out_stride);
}
void turn_words(const PackedLevels& p, int64_t channels, int64_t count, uint32_t* words, int64_t stride) {
  HWY_DYNAMIC_DISPATCH(TurnWords)(p, channels, count, words, stride);
}
void sum_levels(const PackedLevels& p, const uint32_t* words, int64_t stride, const float* w, int64_t w_stride,
                int64_t rows, int64_t first, int64_t end, int64_t channels, float* y, int64_t y_stride) {
  HWY_DYNAMIC_DISPATCH(SumLevels)(p, words, stride, w, w_stride, rows, first, end, channels, y, y_stride);
}
void fold_line(const float* x, int64_t x_stride, int64_t rows, const float* scale, const float* zero, int64_t n,
               float* out, int64_t out_stride, float* sums) {
  HWY_DYNAMIC_DISPATCH(FoldLine)(x, x_stride, rows, scale, zero, n, out, out_stride, sums);
}

}  // namespace vqkv::kernels
#endif
