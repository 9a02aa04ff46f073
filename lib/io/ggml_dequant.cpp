#include "io/ggml_dequant.h"

#include <fmt/format.h>

#include <array>
#include <bit>
#include <cstring>

#include "core/dtype.h"
#include "core/error.h"

namespace vqkv {
namespace {

constexpr int kSuper = 256;  // values of a K-type super-block

// Blocks as they stand in the file. f16 is a plain uint16_t, and no field is wider than its offset's alignment, so the
// structs have no padding (held by the assertions); blocks in a file have no alignment and are copied out first.
struct BlockQ4_0 {
  f16 d;
  uint8_t qs[16];
};
struct BlockQ4_1 {
  f16 d, m;
  uint8_t qs[16];
};
struct BlockQ5_0 {
  f16 d;
  uint8_t qh[4];
  uint8_t qs[16];
};
struct BlockQ5_1 {
  f16 d, m;
  uint8_t qh[4];
  uint8_t qs[16];
};
struct BlockQ8_0 {
  f16 d;
  int8_t qs[32];
};
struct BlockQ2_K {
  uint8_t scales[16];
  uint8_t qs[64];
  f16 d, dmin;
};
struct BlockQ3_K {
  uint8_t hmask[32];
  uint8_t qs[64];
  uint8_t scales[12];
  f16 d;
};
struct BlockQ4_K {
  f16 d, dmin;
  uint8_t scales[12];
  uint8_t qs[128];
};
struct BlockQ5_K {
  f16 d, dmin;
  uint8_t scales[12];
  uint8_t qh[32];
  uint8_t qs[128];
};
struct BlockQ6_K {
  uint8_t ql[128];
  uint8_t qh[64];
  int8_t scales[16];
  f16 d;
};
struct BlockIQ4_NL {
  f16 d;
  uint8_t qs[16];
};
static_assert(sizeof(BlockQ4_0) == 18 && sizeof(BlockQ4_1) == 20 && sizeof(BlockQ5_0) == 22 && sizeof(BlockQ5_1) == 24);
static_assert(sizeof(BlockQ8_0) == 34 && sizeof(BlockQ2_K) == 84 && sizeof(BlockQ3_K) == 110 &&
              sizeof(BlockQ4_K) == 144);
static_assert(sizeof(BlockQ5_K) == 176 && sizeof(BlockQ6_K) == 210 && sizeof(BlockIQ4_NL) == 18);
static_assert(std::endian::native == std::endian::little, "model files are little-endian and read in place");

constexpr std::array<GgmlTypeFacts, 14> kTypes{{
    {GgmlType::kF32, "F32", 1, 4},
    {GgmlType::kF16, "F16", 1, 2},
    {GgmlType::kBF16, "BF16", 1, 2},
    {GgmlType::kQ4_0, "Q4_0", 32, sizeof(BlockQ4_0)},
    {GgmlType::kQ4_1, "Q4_1", 32, sizeof(BlockQ4_1)},
    {GgmlType::kQ5_0, "Q5_0", 32, sizeof(BlockQ5_0)},
    {GgmlType::kQ5_1, "Q5_1", 32, sizeof(BlockQ5_1)},
    {GgmlType::kQ8_0, "Q8_0", 32, sizeof(BlockQ8_0)},
    {GgmlType::kQ2_K, "Q2_K", kSuper, sizeof(BlockQ2_K)},
    {GgmlType::kQ3_K, "Q3_K", kSuper, sizeof(BlockQ3_K)},
    {GgmlType::kQ4_K, "Q4_K", kSuper, sizeof(BlockQ4_K)},
    {GgmlType::kQ5_K, "Q5_K", kSuper, sizeof(BlockQ5_K)},
    {GgmlType::kQ6_K, "Q6_K", kSuper, sizeof(BlockQ6_K)},
    {GgmlType::kIQ4_NL, "IQ4_NL", 32, sizeof(BlockIQ4_NL)},
}};

// The sixteen levels of IQ4_NL, constants of the format.
constexpr float kIq4NlLevels[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

void expand(const BlockQ4_0& b, float* out) {
  const float d = to_float(b.d);
  for (int i = 0; i < 16; ++i) {
    out[i] = d * static_cast<float>((b.qs[i] & 15) - 8);
    out[i + 16] = d * static_cast<float>((b.qs[i] >> 4) - 8);
  }
}

void expand(const BlockQ4_1& b, float* out) {
  const float d = to_float(b.d), m = to_float(b.m);
  for (int i = 0; i < 16; ++i) {
    out[i] = d * static_cast<float>(b.qs[i] & 15) + m;
    out[i + 16] = d * static_cast<float>(b.qs[i] >> 4) + m;
  }
}

uint32_t fifth_bits(const uint8_t (&qh)[4]) {
  uint32_t bits;
  std::memcpy(&bits, qh, sizeof bits);
  return bits;
}

void expand(const BlockQ5_0& b, float* out) {
  const float d = to_float(b.d);
  const uint32_t high = fifth_bits(b.qh);
  for (int i = 0; i < 16; ++i) {
    const int low_half = (b.qs[i] & 15) | static_cast<int>((high >> i & 1) << 4);
    const int high_half = (b.qs[i] >> 4) | static_cast<int>((high >> (i + 16) & 1) << 4);
    out[i] = d * static_cast<float>(low_half - 16);
    out[i + 16] = d * static_cast<float>(high_half - 16);
  }
}

void expand(const BlockQ5_1& b, float* out) {
  const float d = to_float(b.d), m = to_float(b.m);
  const uint32_t high = fifth_bits(b.qh);
  for (int i = 0; i < 16; ++i) {
    const int low_half = (b.qs[i] & 15) | static_cast<int>((high >> i & 1) << 4);
    const int high_half = (b.qs[i] >> 4) | static_cast<int>((high >> (i + 16) & 1) << 4);
    out[i] = d * static_cast<float>(low_half) + m;
    out[i + 16] = d * static_cast<float>(high_half) + m;
  }
}

void expand(const BlockQ8_0& b, float* out) {
  const float d = to_float(b.d);
  for (int i = 0; i < 32; ++i) out[i] = static_cast<float>(b.qs[i]) * d;
}

void expand(const BlockIQ4_NL& b, float* out) {
  const float d = to_float(b.d);
  for (int i = 0; i < 16; ++i) {
    out[i] = d * kIq4NlLevels[b.qs[i] & 15];
    out[i + 16] = d * kIq4NlLevels[b.qs[i] >> 4];
  }
}

// Q2_K and Q3_K keep two bits a value: sub-block k of sixteen values reads bytes 32 * (k / 8) + 16 * (k % 2) + l,
// shifted by 2 * (k % 8 / 2).
void expand(const BlockQ2_K& b, float* out) {
  const float d = to_float(b.d), dmin = to_float(b.dmin);
  for (int k = 0; k < 16; ++k) {
    const float scale = d * static_cast<float>(b.scales[k] & 15);
    const float minimum = dmin * static_cast<float>(b.scales[k] >> 4);
    const uint8_t* qs = b.qs + 32 * (k / 8) + 16 * (k % 2);
    const int shift = 2 * (k % 8 / 2);
    for (int l = 0; l < 16; ++l) out[16 * k + l] = scale * static_cast<float>(qs[l] >> shift & 3) - minimum;
  }
}

void expand(const BlockQ3_K& b, float* out) {
  const float d = to_float(b.d);
  for (int k = 0; k < 16; ++k) {
    const int low = k < 8 ? b.scales[k] & 15 : b.scales[k - 8] >> 4;
    const int high = b.scales[8 + k % 4] >> (2 * (k / 4)) & 3;
    const float scale = d * static_cast<float>((low | high << 4) - 32);
    const uint8_t* qs = b.qs + 32 * (k / 8) + 16 * (k % 2);
    const uint8_t* mask = b.hmask + 16 * (k % 2);
    const int shift = 2 * (k % 8 / 2);
    const int bit = k / 2;
    for (int l = 0; l < 16; ++l) {
      const int value = (qs[l] >> shift & 3) - ((mask[l] >> bit & 1) ? 0 : 4);  // a set bit means no offset
      out[16 * k + l] = scale * static_cast<float>(value);
    }
  }
}

// Scale and minimum of sub-block j of eight, six bits each.
struct ScaleMin {
  int scale, minimum;
};
ScaleMin six_bit_pair(const uint8_t (&b)[12], int j) {
  if (j < 4) return {b[j] & 63, b[j + 4] & 63};
  return {(b[j + 4] & 15) | (b[j - 4] >> 6) << 4, (b[j + 4] >> 4) | (b[j] >> 6) << 4};
}

void expand(const BlockQ4_K& b, float* out) {
  const float d = to_float(b.d), dmin = to_float(b.dmin);
  for (int g = 0; g < 8; ++g) {
    const auto [sc, mn] = six_bit_pair(b.scales, g);
    const float scale = d * static_cast<float>(sc), minimum = dmin * static_cast<float>(mn);
    const uint8_t* qs = b.qs + 32 * (g / 2);
    const int shift = 4 * (g % 2);
    for (int l = 0; l < 32; ++l) out[32 * g + l] = scale * static_cast<float>(qs[l] >> shift & 15) - minimum;
  }
}

void expand(const BlockQ5_K& b, float* out) {
  const float d = to_float(b.d), dmin = to_float(b.dmin);
  for (int g = 0; g < 8; ++g) {
    const auto [sc, mn] = six_bit_pair(b.scales, g);
    const float scale = d * static_cast<float>(sc), minimum = dmin * static_cast<float>(mn);
    const uint8_t* qs = b.qs + 32 * (g / 2);
    const int shift = 4 * (g % 2);
    for (int l = 0; l < 32; ++l) {
      const int value = (qs[l] >> shift & 15) | (b.qh[l] >> g & 1) << 4;
      out[32 * g + l] = scale * static_cast<float>(value) - minimum;
    }
  }
}

void expand(const BlockQ6_K& b, float* out) {
  const float d = to_float(b.d);
  for (int k = 0; k < 16; ++k) {
    const int half = k / 8, t = k % 8 / 2, first = 16 * (k % 2);
    const float scale = d * static_cast<float>(b.scales[k]);
    const uint8_t* ql = b.ql + 64 * half + 32 * (t % 2) + first;
    const uint8_t* qh = b.qh + 32 * half + first;
    for (int l = 0; l < 16; ++l) {
      const int low = t < 2 ? ql[l] & 15 : ql[l] >> 4;
      const int high = qh[l] >> (2 * t) & 3;
      out[16 * k + l] = scale * static_cast<float>((low | high << 4) - 32);
    }
  }
}

template <class Block>
void expand_all(const uint8_t* in, float* out, int64_t blocks, int elements) {
  for (int64_t i = 0; i < blocks; ++i) {
    Block block;
    std::memcpy(&block, in + i * static_cast<int64_t>(sizeof block), sizeof block);
    expand(block, out + i * elements);
  }
}

// Widening without the processor's own instruction, which turns signalling NaNs into quiet ones: the stored bits stay.
template <class Half>
void widen(const uint8_t* in, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    Half half;
    std::memcpy(&half, in + 2 * i, sizeof half);
    out[i] = to_float(half);
  }
}

}  // namespace

const GgmlTypeFacts* ggml_type_facts(uint32_t type) {
  for (const auto& facts : kTypes)
    if (static_cast<uint32_t>(facts.type) == type) return &facts;
  return nullptr;
}

const GgmlTypeFacts& ggml_type_facts(GgmlType type) {
  const GgmlTypeFacts* facts = ggml_type_facts(static_cast<uint32_t>(type));
  VQKV_CHECK(facts != nullptr);
  return *facts;
}

std::string ggml_type_names() {
  std::string names;
  for (const auto& facts : kTypes) names += (names.empty() ? "" : ", ") + std::string(facts.name);
  return names;
}

std::span<const float, 16> ggml_iq4_nl_levels() { return kIq4NlLevels; }

void ggml_dequantize(GgmlType type, const uint8_t* blocks, float* out, int64_t n) {
  const GgmlTypeFacts& facts = ggml_type_facts(type);
  VQKV_CHECK(n >= 0 && n % facts.block_elements == 0);
  const int64_t count = n / facts.block_elements;
  switch (type) {
    case GgmlType::kF32:
      std::memcpy(out, blocks, static_cast<size_t>(n) * sizeof(float));
      return;
    case GgmlType::kF16:
      widen<f16>(blocks, out, n);
      return;
    case GgmlType::kBF16:
      widen<bf16>(blocks, out, n);
      return;
    case GgmlType::kQ4_0:
      expand_all<BlockQ4_0>(blocks, out, count, 32);
      return;
    case GgmlType::kQ4_1:
      expand_all<BlockQ4_1>(blocks, out, count, 32);
      return;
    case GgmlType::kQ5_0:
      expand_all<BlockQ5_0>(blocks, out, count, 32);
      return;
    case GgmlType::kQ5_1:
      expand_all<BlockQ5_1>(blocks, out, count, 32);
      return;
    case GgmlType::kQ8_0:
      expand_all<BlockQ8_0>(blocks, out, count, 32);
      return;
    case GgmlType::kQ2_K:
      expand_all<BlockQ2_K>(blocks, out, count, kSuper);
      return;
    case GgmlType::kQ3_K:
      expand_all<BlockQ3_K>(blocks, out, count, kSuper);
      return;
    case GgmlType::kQ4_K:
      expand_all<BlockQ4_K>(blocks, out, count, kSuper);
      return;
    case GgmlType::kQ5_K:
      expand_all<BlockQ5_K>(blocks, out, count, kSuper);
      return;
    case GgmlType::kQ6_K:
      expand_all<BlockQ6_K>(blocks, out, count, kSuper);
      return;
    case GgmlType::kIQ4_NL:
      expand_all<BlockIQ4_NL>(blocks, out, count, 32);
      return;
  }
  fail_internal("ggml_dequantize: a type without an expansion");
}

}  // namespace vqkv
