// Byte-level BPE. Judged by Hugging Face's `tokenizers` (tests/golden/test_tokenizers.cpp); where llama.cpp differs
// (NFC, added tokens of equal start), the former is followed.
#include <fmt/format.h>
#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <unordered_map>

#include "core/error.h"
#include "core/log.h"
#include "model/added_tokens.h"
#include "model/bpe_merges.h"
#include "model/pre_tokenizer.h"
#include "model/tokenizer_data.h"

namespace vqkv {
namespace {

// GPT-2's byte alphabet: printable bytes of Latin-1 stand for themselves, the other 68 for U+0100 and up, in order.
struct ByteAlphabet {
  std::array<uint32_t, 256> code_point{};
  std::array<int, 512> byte{};  // of a code point below 512; -1: not in the alphabet
  ByteAlphabet() {
    byte.fill(-1);
    uint32_t next = 256;
    for (uint32_t b = 0; b < 256; ++b) {
      const bool printable = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
      code_point[b] = printable ? b : next++;
      byte[code_point[b]] = static_cast<int>(b);
    }
  }
};

const ByteAlphabet& alphabet() {
  static const ByteAlphabet a;
  return a;
}

// The bytes that a token stands for; a token with a character outside the alphabet stands for its own text.
std::string token_bytes(const std::string& token) {
  std::string out;
  for (size_t i = 0; i < token.size();) {
    utf8proc_int32_t c = -1;
    const utf8proc_ssize_t n = utf8proc_iterate(reinterpret_cast<const utf8proc_uint8_t*>(token.data()) + i,
                                                static_cast<utf8proc_ssize_t>(token.size() - i), &c);
    if (n <= 0 || c >= 512 || alphabet().byte[static_cast<size_t>(c)] < 0) return token;
    out += static_cast<char>(alphabet().byte[static_cast<size_t>(c)]);
    i += static_cast<size_t>(n);
  }
  return out;
}

std::string to_nfc(std::string_view text) {
  utf8proc_uint8_t* out = nullptr;
  const utf8proc_ssize_t n =
      utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()), static_cast<utf8proc_ssize_t>(text.size()),
                   &out, static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
  if (n < 0) fail_data(fmt::format("text cannot be normalised to NFC: {}", utf8proc_errmsg(n)));
  std::string result(reinterpret_cast<const char*>(out), static_cast<size_t>(n));
  std::free(out);
  return result;
}

class BpeTokenizer final : public Tokenizer {
 public:
  explicit BpeTokenizer(TokenizerData data)
      : pre_(data.pre),
        pre_tokenizer_(data.pre),
        nfc_(data.nfc),
        ignore_merges_(data.ignore_merges),
        unknown_(data.unknown),
        fuse_unknown_(data.fuse_unknown),
        where_(data.where) {
    special_ = std::move(data.special);
    chat_template_ = std::move(data.chat_template);
    index_tokens(data);
    merges_.read(data, id_of_);
  }

  std::string kind() const override { return "bpe/" + pre_; }
  int32_t size() const override { return static_cast<int32_t>(bytes_.size()); }

  std::string piece(int32_t id) const override {
    if (id < 0 || id >= size()) {
      fail_data(fmt::format("token id {} is outside the vocabulary of {} tokens ({})", id, size(), where_));
    }
    return bytes_[static_cast<size_t>(id)];
  }

  std::string decode(const std::vector<int32_t>& ids, bool skip_special) const override {
    std::string out;
    for (const int32_t id : ids) {
      if (padded(id)) continue;
      const std::string text = piece(id);
      if (!skip_special || !control_[static_cast<size_t>(id)]) out += text;
    }
    return out;
  }

  std::vector<int32_t> encode(std::string_view text, bool parse_special) const override {
    require_utf8(text, "text to tokenize");
    std::vector<int32_t> out;
    const auto words = [&](std::string_view stretch) {
      pre_tokenizer_.split(stretch, [&](std::string_view word) { encode_word(word, out); });
    };
    const auto token = [&](int32_t id) { out.push_back(id); };
    const Added& added = added_[parse_special ? 1 : 0];
    added.as_written.cut(
        text,
        [&](std::string_view stretch) {
          if (!nfc_) {
            words(stretch);
            return;
          }
          added.normalized.cut(to_nfc(stretch), words, token);
        },
        token);
    return out;
  }

 private:
  struct Added {
    TokenMatcher as_written, normalized;
  };

  void index_tokens(const TokenizerData& data) {
    const size_t n = data.tokens.size();
    VQKV_CHECK(data.types.size() == n);
    if (n == 0 || n > 10'000'000) fail_data(fmt::format("{}: a vocabulary of {} tokens", where_, n));
    bytes_.reserve(n);
    id_of_.reserve(n);
    control_.resize(n);
    for (size_t i = 0; i < n; ++i) {
      const std::string& token = data.tokens[i];
      const int32_t id = static_cast<int32_t>(i);
      if (const auto [it, fresh] = id_of_.emplace(token, id); !fresh) {
        fail_data(fmt::format("{}: token \"{}\" stands twice in the vocabulary: ids {} and {}", where_, token,
                              it->second, id));
      }
      const TokenType type = data.types[i];
      const bool user = type == TokenType::kUserDefined;
      control_[i] = type == TokenType::kControl || type == TokenType::kUnknown;
      if (!user && !control_[i]) {
        bytes_.push_back(token_bytes(token));
        continue;
      }
      bytes_.push_back(token);
      if (token.empty() || token.size() > TokenMatcher::kLongest) {
        fail_data(fmt::format("{}: the special token with id {} has {} bytes; allowed are 1 to {}", where_, id,
                              token.size(), TokenMatcher::kLongest));
      }
      const bool late = nfc_ && !data.after_normalizer.empty() && data.after_normalizer[i];
      for (const size_t parse : {size_t{0}, size_t{1}}) {
        if (!user && parse == 0) continue;
        (late ? added_[parse].normalized : added_[parse].as_written).add(token, id);
      }
    }
    for (size_t b = 0; b < 256; ++b) {
      const auto it = id_of_.find(utf8_encode(alphabet().code_point[b]));
      byte_token_[b] = it == id_of_.end() ? -1 : it->second;
    }
  }

  void encode_word(std::string_view word, std::vector<int32_t>& out) const {
    if (ignore_merges_) {
      std::string key;
      for (const char c : word) key += utf8_encode(alphabet().code_point[static_cast<uint8_t>(c)]);
      if (const auto it = id_of_.find(key); it != id_of_.end()) {
        out.push_back(it->second);
        return;
      }
    }
    std::vector<int32_t> symbols;
    symbols.reserve(word.size());
    bool last_unknown = false;
    for (const char c : word) {
      int32_t id = byte_token_[static_cast<uint8_t>(c)];
      if (id < 0) {
        warn_missing(static_cast<uint8_t>(c));
        if (unknown_ < 0 || (fuse_unknown_ && last_unknown)) continue;
        id = unknown_;
        last_unknown = true;
      } else {
        last_unknown = false;
      }
      symbols.push_back(id);
    }
    merges_.apply(symbols, out);
  }

  // Small vocabularies lack some bytes (SmolLM2's lacks 21, all of them rare); the published tokenizers leave them out
  // of the ids without a word. So do we, but not silently.
  void warn_missing(uint8_t byte) const {
    if (warned_.exchange(true)) return;
    log_warning(fmt::format("{}: the vocabulary has no token for byte 0x{:02x}; it is {} (said once)", where_, byte,
                            unknown_ < 0 ? "left out of the token ids" : "replaced by the unknown token"));
  }

  std::string pre_;
  PreTokenizer pre_tokenizer_;
  bool nfc_, ignore_merges_;
  int32_t unknown_;
  bool fuse_unknown_;
  std::string where_;
  std::vector<std::string> bytes_;
  std::vector<bool> control_;
  std::unordered_map<std::string, int32_t> id_of_;
  BpeMerges merges_;
  std::array<int32_t, 256> byte_token_{};
  std::array<Added, 2> added_;  // without and with control tokens
  mutable std::atomic<bool> warned_{false};
};

}  // namespace

std::string_view known_pre_tokenizer(std::string_view gguf_pre) {
  constexpr std::array<std::pair<std::string_view, std::string_view>, 8> kNames{{{"gpt-2", "gpt2"},
                                                                                 {"gpt2", "gpt2"},
                                                                                 {"smollm", "smollm"},
                                                                                 {"qwen2", "qwen2"},
                                                                                 {"deepseek-r1-qwen", "qwen2"},
                                                                                 {"llama-bpe", "llama-bpe"},
                                                                                 {"llama3", "llama-bpe"},
                                                                                 {"llama-v3", "llama-bpe"}}};
  for (const auto& [name, own] : kNames) {
    if (name == gguf_pre) return own;
  }
  return "";
}

std::unique_ptr<Tokenizer> make_bpe_tokenizer(TokenizerData data) {
  if (data.pre == kMetaspace) return make_metaspace_tokenizer(std::move(data));
  return std::make_unique<BpeTokenizer>(std::move(data));
}

}  // namespace vqkv
