// SentencePiece's BPE model from a vocabulary with scores: the adjacent pair whose joined piece has the highest score
// is merged first, the leftmost on ties; what is no piece in the end is spelled in byte tokens. Judged by
// libsentencepiece (tests/golden/test_tokenizers.cpp).
#include <fmt/format.h>

#include <array>
#include <cmath>
#include <functional>
#include <queue>
#include <unordered_map>

#include "core/error.h"
#include "model/added_tokens.h"
#include "model/tokenizer_data.h"

namespace vqkv {
namespace {

class SpmTokenizer final : public Tokenizer {
 public:
  explicit SpmTokenizer(TokenizerData data)
      : prefix_(data.prefix),
        unknown_(data.unknown),
        where_(std::move(data.where)),
        tokens_(std::move(data.tokens)),
        types_(std::move(data.types)),
        scores_(std::move(data.scores)) {
    special_ = std::move(data.special);
    chat_template_ = std::move(data.chat_template);
    if (scores_.size() != tokens_.size()) {
      fail_data(fmt::format("{}: {} scores for {} tokens", where_, scores_.size(), tokens_.size()));
    }
    byte_token_.fill(-1);
    for (size_t i = 0; i < tokens_.size(); ++i) index_token(static_cast<int32_t>(i));
    for (size_t b = 0; b < 256; ++b) {
      if (byte_token_[b] < 0 && unknown_ < 0) {
        fail_data(
            fmt::format("{}: no byte token <0x{:02X}> and no unknown token: some text would have no ids", where_, b));
      }
    }
  }

  std::string kind() const override { return "spm"; }
  int32_t size() const override { return static_cast<int32_t>(tokens_.size()); }

  std::string piece(int32_t id) const override {
    if (id < 0 || id >= size()) {
      fail_data(fmt::format("token id {} is outside the vocabulary of {} tokens ({})", id, size(), where_));
    }
    const size_t i = static_cast<size_t>(id);
    if (types_[i] == TokenType::kByte) return std::string(1, static_cast<char>(byte_of_token(tokens_[i])));
    if (types_[i] == TokenType::kControl || types_[i] == TokenType::kUnknown) return tokens_[i];
    return unescape_spaces(tokens_[i]);
  }

  std::string decode(const std::vector<int32_t>& ids, bool skip_special) const override {
    std::string out;
    bool first = true;  // the space in front of the first piece is the one that encode put there
    for (const int32_t id : ids) {
      if (padded(id)) continue;
      const std::string text = piece(id);
      const TokenType type = types_[static_cast<size_t>(id)];
      if (type == TokenType::kControl) {
        if (!skip_special) out += text;
        continue;
      }
      out += first && prefix_.where != PrefixSpace::Where::kNever && text.starts_with(' ') ? text.substr(1) : text;
      first = false;
    }
    return out;
  }

  std::vector<int32_t> encode(std::string_view text, bool parse_special) const override {
    require_utf8(text, "text to tokenize");
    std::vector<int32_t> out;
    const auto stretch = [&](std::string_view plain) {
      encode_plain(escape_spaces(plain, prefix_.applies(plain, plain.data() == text.data())), out);
    };
    if (parse_special) {
      control_.cut(text, stretch, [&](int32_t id) { out.push_back(id); });
    } else if (!text.empty()) {
      stretch(text);
    }
    return out;
  }

 private:
  struct Symbol {
    std::string_view text;
    int32_t previous, next;
    bool frozen;
  };
  struct Candidate {
    float score;
    int32_t left, right;
    size_t bytes;  // of both, when the candidate was made
    bool operator<(const Candidate& o) const { return score != o.score ? score < o.score : left > o.left; }
  };
  struct Hash {
    using is_transparent = void;
    size_t operator()(std::string_view s) const { return std::hash<std::string_view>()(s); }
  };
  using Splits = std::unordered_map<std::string_view, size_t>;  // merged unused piece -> length of its left part

  void index_token(int32_t id) {
    const size_t i = static_cast<size_t>(id);
    const std::string& token = tokens_[i];
    const auto require_length = [&] {
      if (token.empty() || token.size() > TokenMatcher::kLongest) {
        fail_data(fmt::format("{}: the special token with id {} has {} bytes; allowed are 1 to {}", where_, id,
                              token.size(), TokenMatcher::kLongest));
      }
    };
    switch (types_[i]) {
      case TokenType::kByte: {
        const int byte = byte_of_token(token);
        if (byte < 0) fail_data(fmt::format("{}: byte token {} is \"{}\"; wanted <0x00> to <0xFF>", where_, id, token));
        if (byte_token_[static_cast<size_t>(byte)] >= 0)
          fail_data(fmt::format("{}: byte token \"{}\" stands twice", where_, token));
        byte_token_[static_cast<size_t>(byte)] = id;
        return;
      }
      case TokenType::kUnknown:
        if (unknown_ < 0) unknown_ = id;
        return;
      case TokenType::kControl:
        require_length();
        control_.add(token, id);
        return;
      case TokenType::kUserDefined:
        require_length();
        user_.add(token, id);
        break;
      case TokenType::kUnused:
        has_unused_ = true;
        break;
      case TokenType::kNormal:
        break;
    }
    if (!std::isfinite(scores_[i]))
      fail_data(fmt::format("{}: the score of token {} is not a finite number", where_, id));
    if (const auto [it, fresh] = pieces_.emplace(token, id); !fresh) {
      fail_data(
          fmt::format("{}: piece \"{}\" stands twice in the vocabulary: ids {} and {}", where_, token, it->second, id));
    }
    longest_ = std::max(longest_, token.size());
  }

  void encode_plain(const std::string& text, std::vector<int32_t>& out) const {
    std::vector<Symbol> symbols;
    for (size_t i = 0; i < text.size();) {
      const std::string_view rest = std::string_view(text).substr(i);
      const TokenMatcher::Match user = user_.at_start(rest);
      const size_t n = user.length ? user.length : utf8_length(text[i]);
      const int32_t at = static_cast<int32_t>(symbols.size());
      symbols.push_back({rest.substr(0, n), at - 1, at + 1, user.length != 0});
      i += n;
    }
    if (symbols.empty()) return;
    symbols.back().next = -1;
    Splits splits;
    std::priority_queue<Candidate> heap;
    const auto consider = [&](int32_t l, int32_t r) {
      if (l < 0 || r < 0) return;
      const Symbol& left = symbols[static_cast<size_t>(l)];
      const Symbol& right = symbols[static_cast<size_t>(r)];
      const size_t bytes = left.text.size() + right.text.size();
      if (left.frozen || right.frozen || bytes > longest_) return;
      const auto it = pieces_.find(std::string_view(left.text.data(), bytes));
      if (it == pieces_.end()) return;
      heap.push({scores_[static_cast<size_t>(it->second)], l, r, bytes});
      if (has_unused_ && types_[static_cast<size_t>(it->second)] == TokenType::kUnused) {
        splits[std::string_view(left.text.data(), bytes)] = left.text.size();
      }
    };
    for (size_t i = 1; i < symbols.size(); ++i) consider(static_cast<int32_t>(i) - 1, static_cast<int32_t>(i));
    while (!heap.empty()) {
      const Candidate best = heap.top();
      heap.pop();
      Symbol& left = symbols[static_cast<size_t>(best.left)];
      Symbol& right = symbols[static_cast<size_t>(best.right)];
      if (left.text.empty() || right.text.empty() || left.text.size() + right.text.size() != best.bytes) continue;
      left.text = std::string_view(left.text.data(), best.bytes);
      left.next = right.next;
      if (right.next >= 0) symbols[static_cast<size_t>(right.next)].previous = best.left;
      right.text = {};
      consider(left.previous, best.left);
      consider(best.left, left.next);
    }
    for (int32_t at = 0; at >= 0; at = symbols[static_cast<size_t>(at)].next)
      emit(symbols[static_cast<size_t>(at)].text, splits, out);
  }

  void emit(std::string_view text, const Splits& splits, std::vector<int32_t>& out) const {
    const auto it = pieces_.find(text);
    if (it != pieces_.end() && types_[static_cast<size_t>(it->second)] != TokenType::kUnused) {
      out.push_back(it->second);
      return;
    }
    // A piece that may be built but not used is taken apart again the way it was built.
    if (const auto split = splits.find(text); it != pieces_.end() && split != splits.end()) {
      emit(text.substr(0, split->second), splits, out);
      emit(text.substr(split->second), splits, out);
      return;
    }
    if (it != pieces_.end()) {  // an unused single character
      out.push_back(it->second);
      return;
    }
    bool all = true;
    for (const char c : text) all = all && byte_token_[static_cast<uint8_t>(c)] >= 0;
    if (!all) {
      out.push_back(unknown_);
      return;
    }
    for (const char c : text) out.push_back(byte_token_[static_cast<uint8_t>(c)]);
  }

  PrefixSpace prefix_;
  int32_t unknown_;
  std::string where_;
  std::vector<std::string> tokens_;
  std::vector<TokenType> types_;
  std::vector<float> scores_;
  std::unordered_map<std::string, int32_t, Hash, std::equal_to<>> pieces_;
  std::array<int32_t, 256> byte_token_{};
  TokenMatcher control_, user_;
  bool has_unused_ = false;
  size_t longest_ = 1;
};

}  // namespace

std::unique_ptr<Tokenizer> make_spm_tokenizer(TokenizerData data) {
  return std::make_unique<SpmTokenizer>(std::move(data));
}

}  // namespace vqkv
