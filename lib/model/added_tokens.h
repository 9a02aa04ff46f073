// Finds tokens written in text: at each place the longest one, the leftmost place first.
#pragma once
#include <array>
#include <cstdint>
#include <string_view>
#include <unordered_map>

namespace vqkv {

class TokenMatcher {
 public:
  static constexpr size_t kLongest = 1024;  // bytes; the longest special token of known checkpoints has under 100
  bool empty() const { return nodes_ == 1; }
  // text is 1 to kLongest bytes. The same text twice keeps the first id.
  void add(std::string_view text, int32_t id);
  // The longest token that `text` starts with: its id and length, or {-1, 0}.
  struct Match {
    int32_t id = -1;
    size_t length = 0;
  };
  Match at_start(std::string_view text) const;

  // Calls plain(stretch) for text without tokens (never empty) and token(id) for each token, in order.
  template <class Plain, class Token>
  void cut(std::string_view text, const Plain& plain, const Token& token) const {
    size_t begin = 0;
    for (size_t i = 0; i < text.size();) {
      const Match match = at_start(text.substr(i));
      if (match.length == 0) {
        ++i;
        continue;
      }
      if (i > begin) plain(text.substr(begin, i - begin));
      token(match.id);
      begin = i += match.length;
    }
    if (begin < text.size()) plain(text.substr(begin));
  }

 private:
  // A trie: (node, byte) -> node.
  std::unordered_map<uint64_t, uint32_t> next_;
  std::unordered_map<uint32_t, int32_t> id_;
  std::array<bool, 256> first_{};
  uint32_t nodes_ = 1;
};

}  // namespace vqkv
