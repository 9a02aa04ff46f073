// What a tokenizer is made of, whatever file it came from; and the tokenizers made of it. Private to lib/model and
// tests.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "model/tokenizer.h"

namespace vqkv {

// The numbers are those of tokenizer.ggml.token_type.
enum class TokenType : uint8_t { kNormal = 1, kUnknown = 2, kControl = 3, kUserDefined = 4, kUnused = 5, kByte = 6 };

struct TokenizerData {
  std::string where;                // the file, for messages
  std::vector<std::string> tokens;  // as the file writes them: in the byte alphabet (BPE) or with U+2581 (SPM)
  std::vector<TokenType> types;     // one a token
  std::vector<float> scores;        // one a token; SPM only
  std::vector<std::pair<std::string, std::string>> merges;  // in rank order; BPE only
  std::string pre;                                          // "gpt2", "smollm", "qwen2" or "llama-bpe"; BPE only
  bool ignore_merges = false;                               // a word that is a token is taken whole (Llama 3)
  bool nfc = false;                                         // text is brought to Unicode's form C first (Qwen2)
  bool add_space_prefix = true;                             // SPM only
  int32_t unknown = -1;                // stands for what the vocabulary cannot express; -1: it is left out (BPE)
  bool fuse_unknown = false;           // a run of unknown bytes is one unknown token
  std::vector<bool> after_normalizer;  // BPE: this added token is looked for after NFC; empty: none is
  SpecialTokens special;
  std::string chat_template;
};

// All throw kBadData that names data.where: a token that stands twice, a merge whose parts or result are no tokens, ...
std::unique_ptr<Tokenizer> make_bpe_tokenizer(TokenizerData data);
// Score-driven merging with byte fallback, as SentencePiece's BPE models do it.
std::unique_ptr<Tokenizer> make_spm_tokenizer(TokenizerData data);
// A tokenizer.model file, through libsentencepiece. special and chat_template are taken from `data`.
std::unique_ptr<Tokenizer> make_sentencepiece_tokenizer(const std::string& model_path, TokenizerData data);

// The pre-tokenizer's own name of a GGUF's tokenizer.ggml.pre; "" when it is not supported.
std::string_view known_pre_tokenizer(std::string_view gguf_pre);

// Sorted, without duplicates: special.stop plus the tokens that checkpoints end a turn or a text with.
void complete_stop_tokens(TokenizerData& data);

// tokenizer.json and the files beside it; `where` names the file. The texts may be "" where a file is missing.
TokenizerData parse_tokenizer_json(std::string_view text, const std::string& where);
void apply_tokenizer_config(TokenizerData& data, std::string_view tokenizer_config, const std::string& where);
void apply_generation_config(TokenizerData& data, std::string_view generation_config, const std::string& where);

// Throws kBadData with the offset of the first byte that is not UTF-8.
void require_utf8(std::string_view text, const std::string& what);
// Bytes of the code point that starts at text[0]; text is valid UTF-8.
size_t utf8_length(char first);
std::string utf8_encode(uint32_t code_point);

}  // namespace vqkv
