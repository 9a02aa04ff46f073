#include "codec/code_block.h"

#include "core/error.h"

namespace vqkv {

int64_t CodeLayout::code_bits_per_block() const {
  int64_t bits = 0;
  for (const FieldSpec& f : fields) bits += int64_t{f.bits} * f.slots * (f.per_token ? block_tokens : 1);
  return bits;
}

int64_t CodeLayout::side_bits_per_block() const {
  int64_t bits = 0;
  for (const SideSpec& s : sides)
    bits += int64_t{8} * static_cast<int64_t>(dtype_size(s.type)) * s.slots * (s.per_token ? block_tokens : 1);
  return bits;
}

double CodeLayout::bits_per_token() const {
  return static_cast<double>(code_bits_per_block() + side_bits_per_block()) / block_tokens;
}

void CodeBlock::resize(const CodeLayout& layout, int64_t n_blocks) {
  VQKV_CHECK(n_blocks >= 0 && layout.block_tokens >= 1);
  blocks = n_blocks;
  const int64_t tokens = n_blocks * layout.block_tokens;
  fields.resize(layout.fields.size());
  for (size_t f = 0; f < fields.size(); ++f) {
    const FieldSpec& spec = layout.fields[f];
    fields[f].assign(static_cast<size_t>((spec.per_token ? tokens : n_blocks) * spec.slots), 0);
  }
  sides.resize(layout.sides.size());
  for (size_t s = 0; s < sides.size(); ++s) {
    const SideSpec& spec = layout.sides[s];
    sides[s].assign(static_cast<size_t>((spec.per_token ? tokens : n_blocks) * spec.slots), 0.0f);
  }
  overlay.clear();
}

}  // namespace vqkv
