// 16-bit storage types and their conversions. Conversions round to nearest even and keep NaN and infinities.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

namespace vqkv {

enum class DType : uint8_t { kF32, kF16, kBF16, kF8E5M2, kU8, kU16, kI32 };

size_t dtype_size(DType t);
std::string_view dtype_name(DType t);
DType dtype_from_name(std::string_view name);  // throws kUsage naming the allowed ones

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

inline float to_float(bf16 v) { return std::bit_cast<float>(static_cast<uint32_t>(v.bits) << 16); }
inline bf16 to_bf16(float v) {
  const uint32_t u = std::bit_cast<uint32_t>(v);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((u >> 16) | 0x40u)};  // keep NaN a NaN
  return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

inline float to_float(f16 h) {
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000u) << 16;
  const uint32_t exponent = (h.bits >> 10) & 0x1fu;
  const uint32_t mantissa = h.bits & 0x3ffu;
  if (exponent == 0) {  // zero and subnormals: mantissa * 2^-24 exactly
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | sign);
  }
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  return std::bit_cast<float>(sign | ((exponent + 112u) << 23) | (mantissa << 13));
}
inline f16 to_f16(float v) {
  const uint32_t u = std::bit_cast<uint32_t>(v);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  const uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x1ffu))};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to infinity
  if (magnitude < 0x38800000u) {  // subnormal half: add and subtract a power of two so that the FPU rounds
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23);
  return {static_cast<uint16_t>(sign | (rounded >> 13))};
}

// The two 8-bit formats of OCP. E4M3 has no infinities and one NaN a sign: its largest number is 448, and what rounds
// above is NaN. E5M2 is the upper byte of a half.
struct f8e4m3 {
  uint8_t bits;
};
struct f8e5m2 {
  uint8_t bits;
};

namespace detail {

// The magnitude of |v| in `mantissa` bits and exponents of this bias; `beyond` where it rounds to more than `most`.
template <int mantissa, int bias, uint32_t most, uint32_t beyond>
uint8_t to_f8(float v) {
  const uint32_t u = std::bit_cast<uint32_t>(v), sign = (u >> 24) & 0x80u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint8_t>(sign | 0x7fu);
  constexpr int kShift = 23 - mantissa;
  if (magnitude < static_cast<uint32_t>(128 - bias) << 23) {  // subnormal: the FPU rounds, as for halves
    constexpr uint32_t kOne = static_cast<uint32_t>(128 - bias + kShift) << 23;
    const float shifted = std::bit_cast<float>(magnitude) + std::bit_cast<float>(kOne);
    return static_cast<uint8_t>(sign | (std::bit_cast<uint32_t>(shifted) - kOne));
  }
  const uint32_t rounded = magnitude + ((1u << (kShift - 1)) - 1) + ((magnitude >> kShift) & 1u);
  const uint32_t code = (rounded >> kShift) - (static_cast<uint32_t>(127 - bias) << mantissa);
  return static_cast<uint8_t>(sign | (code > most ? beyond : code));
}

}  // namespace detail

inline f8e4m3 to_f8e4m3(float v) { return {detail::to_f8<3, 7, 0x7e, 0x7f>(v)}; }
inline f8e5m2 to_f8e5m2(float v) { return {detail::to_f8<2, 15, 0x7b, 0x7c>(v)}; }
inline float to_float(f8e5m2 v) { return to_float(f16{static_cast<uint16_t>(v.bits << 8)}); }
inline float to_float(f8e4m3 v) {
  if ((v.bits & 0x7fu) == 0x7fu) return std::bit_cast<float>(0x7fc00000u | static_cast<uint32_t>(v.bits & 0x80u) << 24);
  // As a half, its exponent is 8 too small.
  return to_float(f16{static_cast<uint16_t>((v.bits & 0x80u) << 8 | (v.bits & 0x7fu) << 7)}) * 256.0f;
}

inline float round_to_f16(float v) { return to_float(to_f16(v)); }
inline float round_to_bf16(float v) { return to_float(to_bf16(v)); }

// Bulk conversions, n elements, vectorised where the processor has the instructions.
void to_float(const f16* in, float* out, int64_t n);
void to_float(const bf16* in, float* out, int64_t n);
// (rows, n): row r from in + r * in_stride to out + r * out_stride.
void to_float(const f16* in, int64_t in_stride, float* out, int64_t out_stride, int64_t rows, int64_t n);
void to_float(const bf16* in, int64_t in_stride, float* out, int64_t out_stride, int64_t rows, int64_t n);
void to_f16(const float* in, f16* out, int64_t n);
void to_bf16(const float* in, bf16* out, int64_t n);

// Round values in place to what `t` can hold (f32 leaves them alone).
void round_to(DType t, float* values, int64_t n);

}  // namespace vqkv
