// Token ids against `tokenizers` and `sentencepiece`, on vocabularies trained for it (make_token_goldens.py).
#include "core/error.h"
#include "model/tokenizer_data.h"
#include "support/catch.h"
#include "support/token_goldens.h"

using namespace vqkv;
using namespace vqkv::testing;

namespace {

TokenizerData spm_data() {
  const Json vocabulary = token_golden("spm.vocab.json");
  TokenizerData data;
  data.where = "spm.vocab.json";
  data.tokens = vocabulary["tokens"].get<std::vector<std::string>>();
  data.scores = vocabulary["scores"].get<std::vector<float>>();
  for (const Json& type : vocabulary["types"]) data.types.push_back(static_cast<TokenType>(type.get<int>()));
  return data;
}

void check_equal(const TokenComparison& result) {
  CHECK(result.strings >= 300);
  for (const std::string& line : result.differences) UNSCOPED_INFO(line);
  CHECK(result.differences.empty());
}

}  // namespace

TEST_CASE("byte-level BPE equals the tokenizers package", "[tokens]") {
  for (const std::string name : {"gpt2", "smollm", "qwen2", "llama-bpe"}) {
    DYNAMIC_SECTION(name) {
      const std::string path = token_golden_path(name + ".tokenizer.json");
      const TokenizerData data = parse_tokenizer_json(read_file(path), path);
      CHECK(data.pre == name);
      CHECK(data.nfc == (name == "qwen2"));
      CHECK(data.ignore_merges == (name == "llama-bpe"));
      const auto tokenizer = make_bpe_tokenizer(data);
      // NFC changes the text itself, so qwen2 alone does not give every text back.
      const TokenComparison result = compare_tokens(*tokenizer, name, name != "qwen2");
      CHECK(result.with_special >= 10);
      check_equal(result);
    }
  }
}

TEST_CASE("the pre-tokenizers do give different ids", "[tokens]") {
  const Json gpt2 = token_golden("gpt2.ids.json")["ids"];
  size_t same = 0;
  const Json smollm = token_golden("smollm.ids.json")["ids"];
  for (size_t i = 0; i < gpt2.size(); ++i) same += gpt2[i] == smollm[i];
  CHECK(same < gpt2.size());
}

TEST_CASE("SentencePiece from scores equals libsentencepiece's own ids", "[tokens]") {
  const auto tokenizer = make_spm_tokenizer(spm_data());
  CHECK(tokenizer->kind() == "spm");
  check_equal(compare_tokens(*tokenizer, "spm", false));
  for (const Json& entry : token_golden("strings.json")) {
    const auto text = entry.get<std::string>();
    if (text.find("\xe2\x96\x81") != std::string::npos || text.find("<0x") != std::string::npos) continue;
    CHECK(tokenizer->decode(tokenizer->encode(text)) == text);
  }
}

TEST_CASE("tokenizer.model through libsentencepiece", "[tokens]") {
  const auto tokenizer = make_sentencepiece_tokenizer(token_golden_path("spm.model"), {});
  check_equal(compare_tokens(*tokenizer, "spm", false));
  const auto own = make_spm_tokenizer(spm_data());
  for (int32_t id = 0; id < own->size(); ++id) CHECK(own->piece(id) == tokenizer->piece(id));
  CHECK(own->decode({1, 500, 600, 2}) == tokenizer->decode({1, 500, 600, 2}));
  CHECK(own->decode({1, 500, 600, 2}, true) == tokenizer->decode({1, 500, 600, 2}, true));
  for (const Tokenizer* t : {own.get(), tokenizer.get()}) {  // padded rows of a model have no text
    CHECK(t->decode({1, t->size(), 500, 600, t->size() + 99}) == t->decode({1, 500, 600}));
    CHECK_THROWS_WITH(t->decode({1, -1}), Catch::Contains("token id -1"));
  }
  CHECK(tokenizer->special().bos == 1);
  CHECK(tokenizer->special().eos == 2);
}
