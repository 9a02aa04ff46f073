// What a tokenizer is made of, whatever file it came from; and the tokenizers made of it. Private to lib/model and
// tests.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "model/tokenizer.h"

namespace vqkv {

// The numbers are those of tokenizer.ggml.token_type.
enum class TokenType : uint8_t { kNormal = 1, kUnknown = 2, kControl = 3, kUserDefined = 4, kUnused = 5, kByte = 6 };

// The space that SentencePiece vocabularies put in front of a text, so that its first word looks like any other.
struct PrefixSpace {
  // kEvery: also in front of each stretch between special tokens.
  enum class Where { kNever, kFirst, kEvery } where = Where::kEvery;
  bool before_space = true;    // also where a space stands there already
  bool by_normalizer = false;  // before added tokens of after_normalizer are looked for
  // `first`: the stretch starts the text.
  bool applies(std::string_view stretch, bool first) const;
};

// TokenizerData::pre of a SentencePiece vocabulary that tokenizer.json holds as BPE with byte fallback.
inline constexpr std::string_view kMetaspace = "metaspace";

// Entries of a vocabulary, and with it the largest id, that a file may hold.
inline constexpr int64_t kMaxTokens = 10'000'000;

struct TokenizerData {
  std::string where;                // the file, for messages
  std::vector<std::string> tokens;  // as the file writes them: in the byte alphabet (BPE) or with U+2581 (SPM)
  std::vector<TokenType> types;     // one a token
  std::vector<float> scores;        // one a token; SPM only
  std::vector<std::pair<std::string, std::string>> merges;  // in rank order; BPE only
  std::string pre;                     // "gpt2", "smollm", "qwen2", "llama-bpe" or kMetaspace; BPE only
  bool ignore_merges = false;          // a word that is a token is taken whole (Llama 3)
  bool nfc = false;                    // text is brought to Unicode's form C first (Qwen2)
  PrefixSpace prefix;                  // SPM and kMetaspace
  bool from_json = false;              // special.add_bos and bos are those of tokenizer.json's template
  int32_t unknown = -1;                // stands for what the vocabulary cannot express; -1: it is left out (BPE)
  bool fuse_unknown = false;           // a run of unknown bytes is one unknown token
  std::vector<bool> after_normalizer;  // BPE: this added token is looked for after NFC; empty: none is
  SpecialTokens special;
  std::string chat_template;
};

// All throw kBadData that names data.where: a token that stands twice, a merge whose parts or result are no tokens, ...
std::unique_ptr<Tokenizer> make_bpe_tokenizer(TokenizerData data);
std::unique_ptr<Tokenizer> make_metaspace_tokenizer(
    TokenizerData data);  // what make_bpe_tokenizer gives for kMetaspace
// Score-driven merging with byte fallback, as SentencePiece's BPE models do it.
std::unique_ptr<Tokenizer> make_spm_tokenizer(TokenizerData data);
// A tokenizer.model file, through libsentencepiece. `complete` gets its pieces and may add what other files say: tokens
// behind the pieces, types, special, prefix, chat_template.
std::unique_ptr<Tokenizer> make_sentencepiece_tokenizer(const std::string& model_path,
                                                        const std::function<void(TokenizerData&)>& complete = {});

// The pre-tokenizer's own name of a GGUF's tokenizer.ggml.pre; "" when it is not supported.
std::string_view known_pre_tokenizer(std::string_view gguf_pre);

// Sorted, without duplicates: special.stop plus the tokens that checkpoints end a turn or a text with.
void complete_stop_tokens(TokenizerData& data);

// `where` names the file.
TokenizerData parse_tokenizer_json(std::string_view text, const std::string& where);
// What a tokenizer.json adds to the vocabulary of the tokenizer.model beside it: added tokens and the template.
void apply_tokenizer_json(TokenizerData& data, std::string_view text, const std::string& where);

// A token that a file names beside the vocabulary.
struct AddedToken {
  std::string content;
  int64_t id = 0;
  bool special = false, normalized = false;
  std::string where;  // file and place
};
class JsonNode;
AddedToken read_added_token(const JsonNode& entry, int64_t id);
// Ids go on behind the vocabulary without a gap. kBadData for an id or a text that is another one in the vocabulary.
void add_tokens(TokenizerData& data, std::vector<AddedToken> added);
void mark_special(TokenizerData& data, int32_t id);  // recognised whole where special tokens are; -1: none
int32_t find_token(const TokenizerData& data, std::string_view token);  // -1: no such token

// The files of a Hugging Face folder beside the vocabulary, "" where one is missing.
struct SideFiles {
  std::string folder;  // for messages
  std::string tokenizer_config, special_tokens_map, added_tokens, generation_config, config, chat_template;
};
// Added tokens, BOS and EOS, the prefix space, the chat template, stop tokens.
void apply_side_files(TokenizerData& data, const SideFiles& files);

// Throws kBadData with the offset of the first byte that is not UTF-8.
void require_utf8(std::string_view text, const std::string& what);
// Bytes of the code point that starts at text[0]; text is valid UTF-8.
size_t utf8_length(char first);
std::string utf8_encode(uint32_t code_point);
// U+2581 for spaces, and back.
std::string escape_spaces(std::string_view text, bool prefix);
std::string unescape_spaces(std::string_view text);
int byte_of_token(std::string_view token);  // of "<0xNN>", -1: another one

}  // namespace vqkv
