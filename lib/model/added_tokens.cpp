#include "model/added_tokens.h"

#include <algorithm>

#include "core/error.h"

namespace vqkv {

void TokenMatcher::add(std::string_view text, int32_t id) {
  VQKV_CHECK(!text.empty() && text.size() <= kLongest);
  first_[static_cast<uint8_t>(text[0])] = true;
  uint32_t node = 0;
  for (const char c : text) {
    const uint64_t edge = uint64_t{node} << 8 | static_cast<uint8_t>(c);
    const auto [it, fresh] = next_.emplace(edge, nodes_);
    if (fresh) ++nodes_;
    node = it->second;
  }
  id_.emplace(node, id);
}

TokenMatcher::Match TokenMatcher::at_start(std::string_view text) const {
  Match best;
  if (text.empty() || !first_[static_cast<uint8_t>(text[0])]) return best;
  uint32_t node = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    const auto edge = next_.find(uint64_t{node} << 8 | static_cast<uint8_t>(text[i]));
    if (edge == next_.end()) break;
    node = edge->second;
    if (const auto it = id_.find(node); it != id_.end()) best = {it->second, i + 1};
  }
  return best;
}

}  // namespace vqkv
