// Texts and pre-tokenised ids, as every tool reads them.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "model/tokenizer.h"

namespace vqkv {

struct TextDocument {
  std::string name;             // the file's name
  std::vector<int32_t> tokens;  // without BOS
};

// One document per file. `texts` are UTF-8 files, `token_ids` files of ids (a JSON array, or decimal numbers parted by
// space or commas), checked against the vocabulary. max_tokens 0: all. kBadData for what can't be read, isn't UTF-8 or
// holds an id out of range; kUsage when nothing was given.
std::vector<TextDocument> read_documents(const std::vector<std::string>& texts,
                                         const std::vector<std::string>& token_ids, const Tokenizer& tokenizer,
                                         int64_t max_tokens = 0);
std::vector<int32_t> parse_token_ids(std::string_view text, int32_t vocab, const std::string& where);

}  // namespace vqkv
