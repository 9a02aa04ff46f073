#include "model/tokenizer_data.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <unordered_map>

#include "core/error.h"

namespace vqkv {
namespace {

constexpr std::string_view kSpace = "\xe2\x96\x81";  // U+2581 stands for a space

}  // namespace

size_t utf8_length(char first) {
  const uint8_t b = static_cast<uint8_t>(first);
  return b < 0x80 ? 1 : b < 0xe0 ? 2 : b < 0xf0 ? 3 : 4;
}

std::string utf8_encode(uint32_t c) {
  std::string out;
  if (c < 0x80) {
    out += static_cast<char>(c);
  } else if (c < 0x800) {
    out += static_cast<char>(0xc0 | (c >> 6));
    out += static_cast<char>(0x80 | (c & 0x3f));
  } else if (c < 0x10000) {
    out += static_cast<char>(0xe0 | (c >> 12));
    out += static_cast<char>(0x80 | ((c >> 6) & 0x3f));
    out += static_cast<char>(0x80 | (c & 0x3f));
  } else {
    out += static_cast<char>(0xf0 | (c >> 18));
    out += static_cast<char>(0x80 | ((c >> 12) & 0x3f));
    out += static_cast<char>(0x80 | ((c >> 6) & 0x3f));
    out += static_cast<char>(0x80 | (c & 0x3f));
  }
  return out;
}

std::string escape_spaces(std::string_view text, bool prefix) {
  std::string out(prefix ? kSpace : "");
  out.reserve(text.size() + 16);
  for (const char c : text) {
    if (c == ' ')
      out += kSpace;
    else
      out += c;
  }
  return out;
}

std::string unescape_spaces(std::string_view text) {
  std::string out;
  for (size_t i = 0; i < text.size();) {
    if (text.substr(i, kSpace.size()) == kSpace) {
      out += ' ';
      i += kSpace.size();
    } else {
      out += text[i++];
    }
  }
  return out;
}

int byte_of_token(std::string_view token) {
  const auto digit = [](char c) { return c >= '0' && c <= '9' ? c - '0' : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1; };
  if (token.size() != 6 || token.substr(0, 3) != "<0x" || token[5] != '>') return -1;
  const int high = digit(token[3]), low = digit(token[4]);
  return high < 0 || low < 0 ? -1 : high * 16 + low;
}

bool PrefixSpace::applies(std::string_view stretch, bool first) const {
  if (where == Where::kNever || (where == Where::kFirst && !first)) return false;
  return before_space || !(stretch.starts_with(' ') || stretch.starts_with(kSpace));
}

void require_utf8(std::string_view text, const std::string& what) {
  if (text.size() > (size_t{1} << 30)) {
    fail_data(fmt::format("{}: {} bytes in one piece; the limit is 1 GiB", what, text.size()));
  }
  for (size_t i = 0; i < text.size();) {
    const uint8_t b = static_cast<uint8_t>(text[i]);
    if (b < 0x80) {
      ++i;
      continue;
    }
    // Unicode's table 3-7: overlong forms, surrogates and what lies above U+10FFFF are not well formed.
    const size_t n = b >= 0xc2 && b < 0xe0 ? 2 : b >= 0xe0 && b < 0xf0 ? 3 : b >= 0xf0 && b < 0xf5 ? 4 : 0;
    bool good = n != 0 && i + n <= text.size();
    for (size_t k = 1; good && k < n; ++k) {
      const uint8_t c = static_cast<uint8_t>(text[i + k]);
      const uint8_t low = k == 1 && b == 0xe0 ? 0xa0 : k == 1 && b == 0xf0 ? 0x90 : 0x80;
      const uint8_t high = k == 1 && b == 0xed ? 0x9f : k == 1 && b == 0xf4 ? 0x8f : 0xbf;
      good = c >= low && c <= high;
    }
    if (!good) fail_data(fmt::format("{}: not UTF-8: byte 0x{:02x} at offset {}", what, b, i));
    i += n;
  }
}

int32_t find_token(const TokenizerData& data, std::string_view token) {
  const auto it = std::find(data.tokens.begin(), data.tokens.end(), token);
  return it == data.tokens.end() ? -1 : static_cast<int32_t>(it - data.tokens.begin());
}

void mark_special(TokenizerData& data, int32_t id) {
  if (id < 0) return;
  TokenType& type = data.types[static_cast<size_t>(id)];
  if (type == TokenType::kNormal || type == TokenType::kUnused || type == TokenType::kUnknown)
    type = TokenType::kControl;
}

void add_tokens(TokenizerData& data, std::vector<AddedToken> added) {
  std::stable_sort(added.begin(), added.end(), [](const AddedToken& a, const AddedToken& b) { return a.id < b.id; });
  for (const AddedToken& token : added) {
    const auto size = static_cast<int64_t>(data.tokens.size());
    const size_t at = static_cast<size_t>(token.id);
    if (token.id < size) {
      if (data.tokens[at] != token.content)
        fail_data(fmt::format("{}: \"{}\" has id {} here, which is \"{}\" in the vocabulary", token.where,
                              token.content, token.id, data.tokens[at]));
      if (token.special)
        mark_special(data, static_cast<int32_t>(token.id));
      else if (data.types[at] == TokenType::kNormal)
        data.types[at] = TokenType::kUserDefined;
      continue;
    }
    if (const int32_t other = find_token(data, token.content); other >= 0)
      fail_data(fmt::format("{}: \"{}\" has id {} here and {} in the vocabulary", token.where, token.content, token.id,
                            other));
    if (token.id > size)
      fail_data(
          fmt::format("{}: \"{}\" has id {}, but no token has id {}; ids go on behind the {} tokens without a gap",
                      token.where, token.content, token.id, size, size));
    data.tokens.push_back(token.content);
    data.types.push_back(token.special ? TokenType::kControl : TokenType::kUserDefined);
    data.after_normalizer.resize(data.tokens.size());
    data.after_normalizer.back() = token.normalized;
  }
}

void complete_stop_tokens(TokenizerData& data) {
  // What published checkpoints end a turn or a text with; taken where the vocabulary marks it as a control token.
  constexpr std::array<std::string_view, 9> kEnds{"<|im_end|>",      "<|eot_id|>",    "<|eom_id|>",
                                                  "<|end_of_text|>", "<|endoftext|>", "<|end|>",
                                                  "<end_of_turn>",   "<|eot|>",       "</s>"};
  std::vector<int32_t>& stop = data.special.stop;
  if (data.special.eos >= 0) stop.push_back(data.special.eos);
  for (size_t i = 0; i < data.tokens.size(); ++i) {
    if (data.types[i] == TokenType::kControl && std::find(kEnds.begin(), kEnds.end(), data.tokens[i]) != kEnds.end()) {
      stop.push_back(static_cast<int32_t>(i));
    }
  }
  std::sort(stop.begin(), stop.end());
  stop.erase(std::unique(stop.begin(), stop.end()), stop.end());
}

}  // namespace vqkv
