// unpack64 with AVX512-VBMI: a permute brings the bytes that 64 bits of codes need into their lane, a shift for each
// byte takes the codes apart. Callers ask core/cpu.h first, and have checked the width.
#pragma once
#include <cstdint>

namespace vqkv {

void unpack64_vbmi(const uint8_t* in, int bits, uint16_t* codes);
void unpack64_vbmi(const uint8_t* in, int bits, uint8_t* codes);

}  // namespace vqkv
