// What this processor can do; asked before any call into a unit compiled for more than the baseline.
#pragma once
#include <string>

namespace vqkv {

// Whether the units of x86-64 (*_avx2.cpp, *_avx512.cpp, *_vbmi.cpp, *_bf16.cpp, *_amx.cpp) are in this build: not on
// other processors, and not with VQKV_PORTABLE (cmake/VqkvOptions.cmake). A call into one stands behind `if constexpr
// (kX86Units)` and a question to cpu_features().
#if defined(__x86_64__) && !defined(VQKV_PORTABLE)
#define VQKV_X86_UNITS 1
#else
#define VQKV_X86_UNITS 0
#endif
inline constexpr bool kX86Units = VQKV_X86_UNITS;

struct CpuFeatures {
  bool avx2 = false;    // AVX2, FMA and F16C
  bool avx512 = false;  // F, BW, CD, DQ, VL: x86-64-v4
  bool avx512_vbmi = false;
  // By AVX512-BF16, where they outrun those of fp32: AMD's do, Intel's run at half the rate (docs/benchmarks.md).
  bool bf16_products = false;
  bool amx = false;  // tiles of bf16 products, and the system lets this process use them
};

// Detected once. VQKV_CPU=baseline|avx2|avx512 lowers it and avx512_bf16 takes bf16_products even where they are slow,
// so that every path can be tested on one machine.
const CpuFeatures& cpu_features();
std::string cpu_model_name();
// The widest arithmetic in use: "avx512+amx", "avx512+bf16", "avx512", "avx2" or "baseline". What a row of results
// names.
std::string cpu_arithmetic();

}  // namespace vqkv
