// The tensor types of GGUF files and their exact expansion to fp32. Layouts: evaluation.md 8.5 (ggml's block formats).
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace vqkv {

// The numbers are those of the file format.
enum class GgmlType : uint32_t {
  kF32 = 0,
  kF16 = 1,
  kQ4_0 = 2,
  kQ4_1 = 3,
  kQ5_0 = 6,
  kQ5_1 = 7,
  kQ8_0 = 8,
  kQ2_K = 10,
  kQ3_K = 11,
  kQ4_K = 12,
  kQ5_K = 13,
  kQ6_K = 14,
  kIQ4_NL = 20,
  kBF16 = 30,
};

struct GgmlTypeFacts {
  GgmlType type;
  std::string_view name;
  int block_elements;  // values a block; a row is a whole number of blocks
  int block_bytes;
};

// nullptr for a number that is not one of the supported types.
const GgmlTypeFacts* ggml_type_facts(uint32_t type);
const GgmlTypeFacts& ggml_type_facts(GgmlType type);
// "Q4_0, Q4_1, ..." for messages.
std::string ggml_type_names();

// The levels of IQ4_NL by code.
std::span<const float, 16> ggml_iq4_nl_levels();

// n values (a multiple of the block's elements) from n / block_elements blocks at `blocks`, which needs no alignment.
// Every operation is one fp32 rounding in the order of the reference, so the bits equal those of the `gguf` Python
// package's dequantize().
void ggml_dequantize(GgmlType type, const uint8_t* blocks, float* out, int64_t n);

}  // namespace vqkv
