#include "core/dtype.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <type_traits>

#include "core/cpu.h"
#include "core/dtype_avx2.h"
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

namespace {

template <class T>
void widen(const T* in, int64_t in_stride, float* out, int64_t out_stride, int64_t rows, int64_t n) {
  int64_t done = 0;  // columns of every row
  if constexpr (kX86Units)
    if (cpu_features().avx2) {
      widen_avx2(in, in_stride, out, out_stride, rows, n);
      done = n / 8 * 8;
    }
  if (done == n) return;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = done; i < n; ++i) out[r * out_stride + i] = to_float(in[r * in_stride + i]);
}

}  // namespace

void to_float(const f16* in, int64_t in_stride, float* out, int64_t out_stride, int64_t rows, int64_t n) {
  widen(in, in_stride, out, out_stride, rows, n);
}
void to_float(const bf16* in, int64_t in_stride, float* out, int64_t out_stride, int64_t rows, int64_t n) {
  widen(in, in_stride, out, out_stride, rows, n);
}
void to_float(const f16* in, float* out, int64_t n) { to_float(in, n, out, n, 1, n); }
void to_float(const bf16* in, float* out, int64_t n) { to_float(in, n, out, n, 1, n); }
void to_f16(const float* in, f16* out, int64_t n) {
  int64_t i = 0;
  if constexpr (kX86Units)
    if (cpu_features().avx2) i = narrow_f16_avx2(in, out, n);
  for (; i < n; ++i) out[i] = to_f16(in[i]);
}
void to_bf16(const float* in, bf16* out, int64_t n) {
  int64_t i = 0;
  if constexpr (kX86Units)
    if (cpu_features().avx2) i = narrow_bf16_avx2(in, out, n);
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
    case DType::kF8E5M2:
      for (int64_t i = 0; i < n; ++i) values[i] = to_float(to_f8e5m2(values[i]));
      return;
    default:
      fail_internal(fmt::format("round_to: {} is not a floating-point cache type", dtype_name(t)));
  }
}

}  // namespace vqkv
