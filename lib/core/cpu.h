// What this processor can do; asked before any call into a unit compiled for more than the baseline.
#pragma once
#include <string>

namespace vqkv {

struct CpuFeatures {
  bool avx2 = false;    // AVX2, FMA and F16C
  bool avx512 = false;  // F, BW, CD, DQ, VL: x86-64-v4
  bool avx512_vbmi = false;
  // AVX512-BF16 whose products outrun fp32's: AMD's do, Intel's run at half the rate of fp32 (docs/benchmarks.md).
  bool fast_bf16_dot = false;
};

// Detected once. VQKV_CPU=baseline|avx2|avx512 lowers it and avx512_bf16 takes AVX512-BF16 even where it is slow, so
// that every path can be tested on one machine.
const CpuFeatures& cpu_features();
std::string cpu_model_name();

}  // namespace vqkv
