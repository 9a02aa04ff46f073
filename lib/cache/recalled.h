// Exact pairs that a far tier sent for attention to one block: they stand in for the codes of their tokens.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/view.h"

namespace vqkv {

struct RecalledPairs {
  struct Head {
    std::vector<int32_t> positions;  // ascending
    Matrix<float> k, v;              // (positions, head_dim) each; keys after RoPE
  };
  int kv_heads = 0;
  std::vector<Head> heads;  // (layers * kv_heads)
  const Head& head(int layer, int kv_head) const { return heads[static_cast<size_t>(layer * kv_heads + kv_head)]; }
  // what(index, position) of the pairs of a head at positions [from, to).
  template <class What>
  void visit(int layer, int kv_head, int64_t from, int64_t to, What&& what) const {
    const std::vector<int32_t>& at = head(layer, kv_head).positions;
    for (auto p = std::lower_bound(at.begin(), at.end(), from); p != at.end() && *p < to; ++p)
      what(p - at.begin(), int64_t{*p});
  }
};

}  // namespace vqkv
