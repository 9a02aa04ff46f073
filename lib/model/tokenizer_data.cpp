#include "model/tokenizer_data.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <unordered_map>

#include "core/error.h"

namespace vqkv {

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
