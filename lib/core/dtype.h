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
