// The tokenizer of a GGUF file: the tokenizer.ggml.* keys (evaluation.md 8.4).
#include "model/tokenizer_gguf.h"

#include <fmt/format.h>

#include "core/error.h"

namespace vqkv {
namespace {

int32_t token_id(const GgufFile& file, std::string_view key, size_t tokens) {
  return static_cast<int32_t>(file.integer_or(key, 0, static_cast<int64_t>(tokens) - 1, -1));
}

void read_merges(const GgufFile& file, TokenizerData& data) {
  if (!file.has("tokenizer.ggml.merges")) {
    fail_data(data.where + ": tokenizer.ggml.merges is missing; byte-level BPE needs it");
  }
  const auto merges = file.strings("tokenizer.ggml.merges");
  data.merges.reserve(merges.size());
  for (size_t rank = 0; rank < merges.size(); ++rank) {
    // The parts are in the byte alphabet, where a space is U+0120: the one space that can stand here divides them.
    const size_t space = merges[rank].find(' ', 1);
    if (space == std::string_view::npos || space + 1 == merges[rank].size() ||
        merges[rank].find(' ', space + 1) != std::string_view::npos) {
      fail_data(fmt::format("{}: tokenizer.ggml.merges[{}] is \"{}\"; wanted two parts and one space", data.where, rank,
                            merges[rank]));
    }
    data.merges.emplace_back(merges[rank].substr(0, space), merges[rank].substr(space + 1));
  }
}

}  // namespace

TokenizerData tokenizer_data_from_gguf(const GgufFile& file) {
  TokenizerData data;
  data.where = file.path();
  if (!file.has("tokenizer.ggml.model"))
    fail_data(data.where + ": no tokenizer in this GGUF (tokenizer.ggml.model is missing)");
  const std::string model(file.string("tokenizer.ggml.model"));
  if (model != "gpt2" && model != "llama") {
    fail_data(fmt::format("{}: tokenizer.ggml.model is \"{}\"; supported: gpt2 (byte-level BPE), llama (SentencePiece)",
                          data.where, model));
  }
  const auto tokens = file.strings("tokenizer.ggml.tokens");
  if (tokens.empty() || static_cast<int64_t>(tokens.size()) > kMaxTokens) {
    fail_data(fmt::format("{}: tokenizer.ggml.tokens has {} entries; allowed are 1 to {}", data.where, tokens.size(),
                          kMaxTokens));
  }
  data.tokens.assign(tokens.begin(), tokens.end());
  for (size_t i = 0; i < tokens.size(); ++i)
    require_utf8(tokens[i], fmt::format("{}: tokenizer.ggml.tokens[{}]", data.where, i));
  data.types.assign(tokens.size(), TokenType::kNormal);
  if (file.has("tokenizer.ggml.token_type")) {
    const auto types = file.integers("tokenizer.ggml.token_type");
    if (types.size() != tokens.size()) {
      fail_data(fmt::format("{}: tokenizer.ggml.token_type has {} entries for {} tokens", data.where, types.size(),
                            tokens.size()));
    }
    for (size_t i = 0; i < types.size(); ++i) {
      if (types[i] < 1 || types[i] > 6) {
        fail_data(fmt::format("{}: tokenizer.ggml.token_type[{}] is {}; allowed are 1 to 6", data.where, i, types[i]));
      }
      data.types[i] = static_cast<TokenType>(types[i]);
    }
  }
  data.chat_template = file.string_or("tokenizer.chat_template", "");
  data.special.bos = token_id(file, "tokenizer.ggml.bos_token_id", tokens.size());
  data.special.eos = token_id(file, "tokenizer.ggml.eos_token_id", tokens.size());
  for (const char* key : {"tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"}) {
    if (const int32_t id = token_id(file, key, tokens.size()); id >= 0) data.special.stop.push_back(id);
  }
  complete_stop_tokens(data);
  if (model == "llama") {
    // These two would change the ids; no Llama-2 or Mistral file sets them, so a file that does is refused.
    if (file.boolean_or("tokenizer.ggml.remove_extra_whitespaces", false) ||
        file.has("tokenizer.ggml.precompiled_charsmap")) {
      fail_data(data.where +
                ": this SentencePiece vocabulary normalises its text (remove_extra_whitespaces or "
                "precompiled_charsmap), which is not supported");
    }
    if (!file.has("tokenizer.ggml.scores"))
      fail_data(data.where + ": tokenizer.ggml.scores is missing; a SentencePiece vocabulary needs it");
    data.scores = file.floats("tokenizer.ggml.scores");
    if (!file.boolean_or("tokenizer.ggml.add_space_prefix", true)) data.prefix.where = PrefixSpace::Where::kNever;
    data.unknown = token_id(file, "tokenizer.ggml.unknown_token_id", tokens.size());
    data.special.add_bos = file.boolean_or("tokenizer.ggml.add_bos_token", true);
  } else {
    const std::string pre(file.string_or("tokenizer.ggml.pre", ""));
    data.pre = known_pre_tokenizer(pre);
    if (data.pre.empty()) {
      fail_data(fmt::format(
          "{}: pre-tokenizer \"{}\" (tokenizer.ggml.pre) is not supported; supported: gpt-2, smollm, qwen2, llama-bpe",
          data.where, pre));
    }
    data.ignore_merges = data.pre == "llama-bpe";
    data.nfc = data.pre == "qwen2";
    // Files of Llama 3 leave the key out and mean yes.
    data.special.add_bos = file.boolean_or("tokenizer.ggml.add_bos_token", data.pre == "llama-bpe");
    read_merges(file, data);
  }
  if (data.special.add_bos && data.special.bos < 0) {
    fail_data(data.where + ": the tokenizer adds a BOS token, but tokenizer.ggml.bos_token_id is missing");
  }
  return data;
}

std::unique_ptr<Tokenizer> tokenizer_from_gguf(const GgufFile& file) {
  TokenizerData data = tokenizer_data_from_gguf(file);
  return data.pre.empty() ? make_spm_tokenizer(std::move(data)) : make_bpe_tokenizer(std::move(data));
}

}  // namespace vqkv
