#include "cache/layout.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "codec/packing.h"
#include "core/error.h"
#include "core/round_up.h"

namespace vqkv {
namespace {

// Ors one code into a run of the form of codec/packing.h.
void put_code(std::byte* run, int64_t index, int bits, uint16_t code) {
  int64_t bit = index * bits;
  uint32_t value = static_cast<uint32_t>(code) << (bit & 7);
  for (std::byte* p = run + (bit >> 3); value != 0; ++p, value >>= 8) *p |= static_cast<std::byte>(value & 0xffu);
}

// `length`: codes in the run. Whole groups of 64 unpack at once.
void get_codes(const std::byte* run, int64_t length, int bits, int64_t first, int64_t count, uint16_t* out) {
  if (bits == 8) {
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<uint16_t>(run[first + i]);
    return;
  }
  const uint8_t* in = reinterpret_cast<const uint8_t*>(run);
  for (int64_t i = 0; i < count;) {
    const int64_t group = (first + i) / kPackGroup, within = (first + i) % kPackGroup;
    const int64_t n = std::min<int64_t>(count - i, kPackGroup - within);
    if (n < 16 || (group + 1) * kPackGroup > length) {
      unpack_bits_at(in, first + i, n, bits, out + i);
    } else if (n == kPackGroup) {
      unpack64(in + group * 8 * bits, bits, out + i);
    } else {
      uint16_t whole[kPackGroup];
      unpack64(in + group * 8 * bits, bits, whole);
      std::copy_n(whole + within, n, out + i);
    }
    i += n;
  }
}

int64_t run_length(bool per_token, int64_t tokens, int block_tokens) {
  return per_token ? tokens : tokens / block_tokens;
}

}  // namespace

PageLayout::PageLayout(const CodeLayout& layout) : layout_(layout) {
  VQKV_CHECK(layout.block_tokens >= 1);
  tokens_ = std::lcm(int64_t{64}, int64_t{layout.block_tokens});
  int64_t offset = pointer_bytes(tokens_);
  // Then the sides: their runs keep the natural alignment of their type.
  for (const SideSpec& s : layout.sides) {
    const int64_t size = static_cast<int64_t>(dtype_size(s.type));
    offset = round_up(offset, size);
    side_.push_back(offset);
    side_stride_.push_back(run_length(s.per_token, tokens_, layout.block_tokens) * size);
    offset += side_stride_.back() * s.slots;
  }
  for (const FieldSpec& f : layout.fields) {
    VQKV_CHECK(f.bits >= 1 && f.bits <= 16);
    field_.push_back(offset);
    field_stride_.push_back((run_length(f.per_token, tokens_, layout.block_tokens) * f.bits + 7) / 8);
    offset += field_stride_.back() * f.slots;
  }
  bytes_ = offset;
}

void PageLayout::codes(const std::byte* page, int field, int slot, int64_t first, int64_t count, uint16_t* out) const {
  const FieldSpec& f = layout_.fields[at(field)];
  get_codes(page + field_offset(field, slot), run_length(f.per_token, tokens_, layout_.block_tokens), f.bits, first,
            count, out);
}

void PageLayout::side(const std::byte* page, int side, int slot, int64_t first, int64_t count, float* out) const {
  const std::byte* run = page + side_offset(side, slot);
  switch (layout_.sides[at(side)].type) {
    case DType::kF16:
      to_float(reinterpret_cast<const f16*>(run) + first, out, count);
      return;
    case DType::kBF16:
      to_float(reinterpret_cast<const bf16*>(run) + first, out, count);
      return;
    case DType::kF32:
      std::memcpy(out, run + 4 * first, static_cast<size_t>(4 * count));
      return;
    case DType::kU8:
      for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(static_cast<uint8_t>(run[first + i]));
      return;
    case DType::kU16:
      for (int64_t i = 0; i < count; ++i)
        out[i] = static_cast<float>(reinterpret_cast<const uint16_t*>(run)[first + i]);
      return;
    case DType::kF8E5M2:  // the upper byte of an f16
      for (int64_t i = 0; i < count; ++i)
        out[i] = to_float(f16{static_cast<uint16_t>(static_cast<uint16_t>(run[first + i]) << 8)});
      return;
    case DType::kI32:
      for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(reinterpret_cast<const int32_t*>(run)[first + i]);
      return;
  }
}

void PageLayout::store(std::byte* page, int64_t at_block, const CodeBlock& from, int64_t first, int64_t count) const {
  const int64_t bt = layout_.block_tokens;
  for (size_t f = 0; f < layout_.fields.size(); ++f) {
    const FieldSpec& spec = layout_.fields[f];
    const int64_t unit = spec.per_token ? bt : 1;
    for (int slot = 0; slot < spec.slots; ++slot) {
      std::byte* run = page + field_offset(static_cast<int>(f), slot);
      const uint16_t* codes = from.fields[f].data() + first * unit * spec.slots + slot;
      if (spec.bits == 8) {
        for (int64_t i = 0; i < count * unit; ++i)
          run[at_block * unit + i] = static_cast<std::byte>(codes[i * spec.slots]);
      } else {
        for (int64_t i = 0; i < count * unit; ++i) put_code(run, at_block * unit + i, spec.bits, codes[i * spec.slots]);
      }
    }
  }
  for (size_t s = 0; s < layout_.sides.size(); ++s) {
    const SideSpec& spec = layout_.sides[s];
    const int64_t unit = spec.per_token ? bt : 1;
    for (int slot = 0; slot < spec.slots; ++slot) {
      std::byte* run = page + side_offset(static_cast<int>(s), slot);
      for (int64_t i = 0; i < count * unit; ++i) {
        const float v = from.sides[s][static_cast<size_t>((first * unit + i) * spec.slots + slot)];
        const int64_t to = at_block * unit + i;
        switch (spec.type) {
          case DType::kF16:
            reinterpret_cast<f16*>(run)[to] = to_f16(v);
            break;
          case DType::kBF16:
            reinterpret_cast<bf16*>(run)[to] = to_bf16(v);
            break;
          case DType::kF32:
            reinterpret_cast<float*>(run)[to] = v;
            break;
          case DType::kU8:
            run[to] = static_cast<std::byte>(static_cast<uint8_t>(v));
            break;
          case DType::kU16:
            reinterpret_cast<uint16_t*>(run)[to] = static_cast<uint16_t>(v);
            break;
          case DType::kF8E5M2:
            run[to] = static_cast<std::byte>(to_f16(v).bits >> 8);
            break;
          case DType::kI32:
            reinterpret_cast<int32_t*>(run)[to] = static_cast<int32_t>(v);
            break;
        }
      }
    }
  }
}

void PageLayout::fetch(const std::byte* page, int64_t at_block, CodeBlock& to, int64_t first, int64_t count) const {
  const int64_t bt = layout_.block_tokens;
  std::vector<uint16_t> run;
  std::vector<float> values;
  for (size_t f = 0; f < layout_.fields.size(); ++f) {
    const FieldSpec& spec = layout_.fields[f];
    const int64_t unit = spec.per_token ? bt : 1;
    run.resize(static_cast<size_t>(count * unit));
    for (int slot = 0; slot < spec.slots; ++slot) {
      codes(page, static_cast<int>(f), slot, at_block * unit, count * unit, run.data());
      for (int64_t i = 0; i < count * unit; ++i)
        to.fields[f][static_cast<size_t>((first * unit + i) * spec.slots + slot)] = run[static_cast<size_t>(i)];
    }
  }
  for (size_t s = 0; s < layout_.sides.size(); ++s) {
    const SideSpec& spec = layout_.sides[s];
    const int64_t unit = spec.per_token ? bt : 1;
    values.resize(static_cast<size_t>(count * unit));
    for (int slot = 0; slot < spec.slots; ++slot) {
      side(page, static_cast<int>(s), slot, at_block * unit, count * unit, values.data());
      for (int64_t i = 0; i < count * unit; ++i)
        to.sides[s][static_cast<size_t>((first * unit + i) * spec.slots + slot)] = values[static_cast<size_t>(i)];
    }
  }
}

}  // namespace vqkv
