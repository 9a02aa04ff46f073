#include "codec/train/simd.h"

#include <hwy/highway.h>

#include "core/cpu.h"

namespace vqkv {

void use_allowed_simd() {
  static const bool done = [] {
#if HWY_ARCH_X86
    if (!cpu_features().avx512) hwy::DisableTargets(HWY_AVX3 | HWY_AVX3_DL);
    if (!cpu_features().avx2) hwy::DisableTargets(HWY_AVX3 | HWY_AVX3_DL | HWY_AVX2);
#endif
    return true;
  }();
  (void)done;
}

}  // namespace vqkv
