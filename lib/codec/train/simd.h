// Which SIMD targets the dispatched kernels of this folder may use.
#pragma once

namespace vqkv {

// Lowers Highway's choice to what core/cpu.h allows (VQKV_CPU), once; call before a dispatched kernel.
void use_allowed_simd();

}  // namespace vqkv
