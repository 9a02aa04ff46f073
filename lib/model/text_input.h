// Texts and pre-tokenised ids, as every tool reads them.
#pragma once
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "model/tokenizer.h"

namespace vqkv {

struct TextSources {
  std::vector<std::string> texts;      // UTF-8 files, one document a file
  std::vector<std::string> token_ids;  // files of ids: a JSON array, or decimal numbers parted by space or commas
  bool special = false;                // special tokens written in the texts become their ids
  int64_t max_tokens = 0;              // of each document; 0: all
};

struct TextDocument {
  std::string name;             // the file's name
  std::vector<int32_t> tokens;  // BOS first only where the source itself has it
};

// The tokenizer that the sources need: `load`'s, or nullptr and a warning where it throws kBadData and there are ids
// alone.
const Tokenizer* tokenizer_for(const TextSources& sources, const std::function<const Tokenizer&()>& load);
// Ids are checked against `vocab`, the rows of the model, whatever the tokenizer has: a row that it has no text for is
// used as it is. kBadData for what can't be read, isn't UTF-8 or holds an id out of range; kUsage when nothing was
// given, or a file twice.
std::vector<TextDocument> read_documents(const TextSources& sources, const Tokenizer* tokenizer, int32_t vocab);
std::vector<int32_t> parse_token_ids(std::string_view text, int32_t vocab, const std::string& where);

// BOS in front where the tokenizer adds one and the ids have none there.
std::vector<int32_t> with_bos(std::span<const int32_t> ids, const SpecialTokens& special);
// The window of up to `context` tokens, BOS included, that starts at ids[at]; `at` moves on to the next one.
std::vector<int32_t> take_window(std::span<const int32_t> ids, int64_t& at, int64_t context,
                                 const SpecialTokens& special);

}  // namespace vqkv
