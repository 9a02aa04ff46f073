#include "model/text_input.h"

#include "core/error.h"
#include "support/catch.h"
#include "support/model_writers.h"

using namespace vqkv;

TEST_CASE("token ids are read from a JSON array or plain numbers") {
  CHECK(parse_token_ids("[1, 2,3]\n", 10, "t") == std::vector<int32_t>{1, 2, 3});
  CHECK(parse_token_ids("1 2\n3", 10, "t") == std::vector<int32_t>{1, 2, 3});
  CHECK(parse_token_ids("", 10, "t").empty());
}

TEST_CASE("a bad token id names its place") {
  for (const char* broken : {"[1, 2", "[", "[1,,2]", "[,1]", "[1,]", "[1 2]", "[[1],[2]]", "1 2]", "[1][2]"}) {
    CAPTURE(broken);
    CHECK_THROWS_WITH(parse_token_ids(broken, 10, "ids.json"), Catch::Contains("ids.json: byte "));
  }
  CHECK(parse_token_ids(" [ ] ", 10, "t").empty());
  CHECK_THROWS_WITH(parse_token_ids("1 x", 10, "ids.txt"), Catch::Contains("ids.txt: byte 2"));
  CHECK_THROWS_WITH(parse_token_ids("1 10", 10, "ids.txt"),
                    Catch::Contains("token id 10 is outside the vocabulary of 10"));
  CHECK_THROWS_WITH(parse_token_ids("1.5", 10, "ids.txt"), Catch::Contains("byte 0"));
  CHECK_THROWS_WITH(parse_token_ids("99999999999999999999", 10, "t"), Catch::Contains("byte 0"));
  CHECK_THROWS_WITH(parse_token_ids("-1", 10, "t"), Catch::Contains("outside the vocabulary"));
}

TEST_CASE("windows start with BOS where the tokenizer adds one, and never with two") {
  SpecialTokens special{.bos = 1, .eos = 2, .stop = {}, .add_bos = true};
  using Ids = std::vector<int32_t>;
  const auto windows = [&](const Ids& ids, int64_t context) {
    std::vector<Ids> out;
    for (int64_t at = 0; at < static_cast<int64_t>(ids.size());) out.push_back(take_window(ids, at, context, special));
    return out;
  };
  CHECK(windows({5, 6, 7, 8, 9}, 3) == std::vector<Ids>{{1, 5, 6}, {1, 7, 8}, {1, 9}});
  CHECK(windows({1, 5, 6, 7, 8}, 3) == std::vector<Ids>{{1, 5, 6}, {1, 7, 8}});
  CHECK(windows({1, 5, 6, 1, 7, 8}, 3) == std::vector<Ids>{{1, 5, 6}, {1, 7, 8}});  // cut already, BOS in each
  CHECK(with_bos(Ids{1, 5}, special) == Ids{1, 5});
  CHECK(with_bos(Ids{5, 1}, special) == Ids{1, 5, 1});
  CHECK(with_bos(Ids{}, special) == Ids{1});
  special.add_bos = false;
  CHECK(windows({1, 5, 6, 7}, 3) == std::vector<Ids>{{1, 5, 6}, {7}});
  CHECK(with_bos(Ids{5}, special) == Ids{5});
}

TEST_CASE("documents: special tokens on demand, ids without a tokenizer") {
  const testing::TempFolder folder;
  folder.write("tokenizer.json", Json::parse(R"({
    "added_tokens": [{"id": 3, "content": "<s>", "special": true}],
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "use_regex": true},
    "post_processor": {"type": "TemplateProcessing",
                       "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}],
                       "special_tokens": {}},
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}})")
                                     .dump());
  const auto tokenizer = load_tokenizer(folder.path());
  TextSources text{.texts = {folder.write("t.txt", "<s>ab")}, .token_ids = {}};
  using Ids = std::vector<int32_t>;
  CHECK(read_documents(text, tokenizer.get(), 0)[0].tokens == Ids{2});  // "<", "s" and ">" are not in this vocabulary
  text.special = true;
  CHECK(read_documents(text, tokenizer.get(), 0)[0].tokens == Ids{3, 2});
  text.max_tokens = 1;
  CHECK(read_documents(text, tokenizer.get(), 0)[0].tokens == Ids{3});

  const TextSources ids{.texts = {}, .token_ids = {folder.write("t.ids", "[3, 0, 9]")}};
  CHECK(read_documents(ids, tokenizer.get(), 10)[0].tokens == Ids{3, 0, 9});  // of a row beyond the four entries
  CHECK_THROWS_WITH(read_documents(ids, tokenizer.get(), 9),
                    Catch::Contains("token id 9 is outside the vocabulary of 9"));
  const auto none = []() -> const Tokenizer& { fail_data("x.gguf: no tokenizer in this GGUF"); };
  CHECK(tokenizer_for(ids, none) == nullptr);
  CHECK_THROWS_WITH(tokenizer_for(text, none), Catch::Contains("no tokenizer in this GGUF"));
  CHECK(read_documents(ids, nullptr, 10)[0].tokens == Ids{3, 0, 9});
  CHECK_THROWS_WITH(read_documents(ids, nullptr, 9), Catch::Contains("token id 9 is outside the vocabulary of 9"));
  CHECK_THROWS_WITH(read_documents({}, nullptr, 9), Catch::Contains("no text was given"));
  // A document that counts as two makes errors too small.
  TextSources twice = ids;
  twice.token_ids.push_back(ids.token_ids[0]);
  CHECK_THROWS_WITH(read_documents(twice, nullptr, 10),
                    Catch::StartsWith("--token-ids: '") && Catch::EndsWith("t.ids' stands twice"));
  text.texts.push_back(text.texts[0]);
  CHECK_THROWS_WITH(read_documents(text, tokenizer.get(), 0), Catch::StartsWith("--text: '"));
}
