// The real SmolLM2 vocabulary against `tokenizers` (and llama.cpp, which gave the same ids when the file was made).
#include <algorithm>
#include <set>

#include "core/error.h"
#include "model/chat_template.h"
#include "model/tokenizer.h"
#include "support/catch.h"
#include "support/small_model.h"
#include "support/token_goldens.h"

using namespace vqkv;
using namespace vqkv::testing;

namespace {}

TEST_CASE("SmolLM2: ids of the hard strings equal those of the tokenizers package", "[tokens]") {
  const auto tokenizer = load_tokenizer(kModel);
  CHECK(tokenizer->kind() == "bpe/smollm");
  CHECK(tokenizer->size() == 49152);
  const TokenComparison result = compare_tokens(*tokenizer, "smollm2", false);
  CHECK(result.strings >= 300);
  CHECK(result.with_special >= 10);
  for (const std::string& line : result.differences) UNSCOPED_INFO(line);
  CHECK(result.differences.empty());
}

TEST_CASE("SmolLM2: text comes back from its ids unless the vocabulary lacks one of its bytes", "[tokens]") {
  const auto tokenizer = load_tokenizer(kModel);
  std::set<std::string> pieces;
  for (int32_t id = 0; id < tokenizer->size(); ++id) pieces.insert(tokenizer->piece(id));
  int compared = 0;
  for (const Json& entry : token_golden("strings.json")) {
    const auto text = entry.get<std::string>();
    std::string kept;
    for (const char c : text) {
      if (pieces.contains(std::string(1, c))) kept += c;
    }
    CHECK(tokenizer->decode(tokenizer->encode(text)) == kept);
    compared += kept == text;
  }
  CHECK(compared >= 300);
}

TEST_CASE("SmolLM2: special tokens", "[tokens]") {
  const auto tokenizer = load_tokenizer(kModel);
  const SpecialTokens& special = tokenizer->special();
  CHECK(special.bos == 1);
  CHECK(special.eos == 2);
  CHECK_FALSE(special.add_bos);
  CHECK(special.stop == std::vector<int32_t>{0, 2});
  CHECK(tokenizer->piece(2) == "<|im_end|>");
  CHECK(tokenizer->decode({1, 9690, 2}, true) == tokenizer->piece(9690));
  CHECK(tokenizer->decode({1, 9690, 2}) == "<|im_start|>" + tokenizer->piece(9690) + "<|im_end|>");
  CHECK_THROWS_AS(tokenizer->piece(49152), Error);
  CHECK_THROWS_AS(tokenizer->decode({-1}), Error);
  CHECK_THROWS_AS(tokenizer->encode("a\xff"), Error);
}

TEST_CASE("SmolLM2: its chat template is recognised", "[tokens][chat]") {
  const auto tokenizer = load_tokenizer(kModel);
  CHECK(chat_template_name(tokenizer->chat_template()) == "smollm2");
  const std::vector<ChatMessage> messages{{"user", "Hello"}};
  const std::string text = render_chat(*tokenizer, messages, ChatPrompt::kAnswer);
  CHECK(text ==
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n");
  const std::vector<int32_t> ids = encode_chat(*tokenizer, messages, ChatPrompt::kAnswer);
  CHECK(std::count(ids.begin(), ids.end(), 1) == 3);
  CHECK(std::count(ids.begin(), ids.end(), 2) == 2);
  CHECK(tokenizer->decode(ids) == text);
}

TEST_CASE("SmolLM2: every committed text fills four windows of 2,048 tokens", "[tokens]") {
  const auto tokenizer = load_tokenizer(kModel);
  for (const char* name : {"jargon-0", "jargon-1", "jargon-2", "jargon-3", "kjv-0", "kjv-1", "kjv-2"}) {
    const std::string text = read_file(VQKV_SOURCE_DIR "/data/" + std::string(name) + ".txt");
    const std::vector<int32_t> ids = tokenizer->encode(text);
    INFO(name);
    CHECK(ids.size() >= 8192);
    CHECK(tokenizer->decode(ids) == text);
  }
}
