// Tokenizer files that are not what they claim, folders, and words of a megabyte.
#include <chrono>
#include <filesystem>
#include <limits>

#include "core/error.h"
#include "core/rng.h"
#include "model/pre_tokenizer.h"
#include "model/tokenizer_data.h"
#include "support/catch.h"
#include "support/token_goldens.h"

using namespace vqkv;
using namespace vqkv::testing;
using Catch::Contains;
namespace fs = std::filesystem;

namespace {

// Bytes a and b, their merge, and a special token.
Json tiny() {
  return Json::parse(R"({
    "added_tokens": [{"id": 3, "content": "<end>", "single_word": false, "lstrip": false, "rstrip": false,
                      "normalized": false, "special": true}],
    "normalizer": null,
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
    "post_processor": null,
    "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
              "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
              "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}})");
}

std::unique_ptr<Tokenizer> make(const Json& json) {
  return make_bpe_tokenizer(parse_tokenizer_json(json.dump(), "t.json"));
}

void refuses(const std::string& pointer, const Json& value, const std::string& message) {
  Json json = tiny();
  json[Json::json_pointer(pointer)] = value;
  INFO(pointer << " = " << value.dump());
  try {
    make(json);
    FAIL("accepted");
  } catch (const Error& e) {
    CHECK(e.kind() == ErrorKind::kBadData);
    CHECK_THAT(e.what(), Contains("t.json") && Contains(message));
  }
}

struct Folder {
  fs::path path = fs::temp_directory_path() /
                  ("vqkv-tokenizer-" + std::to_string(std::chrono::steady_clock::now().time_since_epoch().count()));
  Folder() { fs::create_directories(path); }
  ~Folder() { fs::remove_all(path); }
  void write(const std::string& name, const std::string& text) const { write_file((path / name).string(), text); }
};

}  // namespace

TEST_CASE("a minimal tokenizer.json", "[tokenizer]") {
  const auto tokenizer = make(tiny());
  CHECK(tokenizer->encode("ab") == std::vector<int32_t>{2});
  CHECK(tokenizer->encode("aab<end>ba", true) == std::vector<int32_t>{0, 2, 3, 1, 0});
  CHECK(tokenizer->encode("ab<end>") == std::vector<int32_t>{2});  // bytes without a token are left out
  Json pairs = tiny();
  pairs["model"]["merges"] = Json::parse(R"([["a", "b"]])");
  CHECK(make(pairs)->encode("ab") == std::vector<int32_t>{2});
  Json user = tiny();
  user["added_tokens"][0]["special"] = false;
  CHECK(make(user)->encode("a<end>b") == std::vector<int32_t>{0, 3, 1});
  Json unknown = tiny();
  unknown["model"]["unk_token"] = "<end>";
  CHECK(make(unknown)->encode("axx") == std::vector<int32_t>{0, 3, 3});
  unknown["model"]["fuse_unk"] = true;
  CHECK(make(unknown)->encode("axxa") == std::vector<int32_t>{0, 3, 0});
}

TEST_CASE("malformed tokenizer.json is refused by name and place", "[tokenizer]") {
  refuses("/model/merges/0", "a c", "\"c\" is not in the vocabulary");
  refuses("/model/merges/0", "b a", "\"ba\" is not in the vocabulary");
  refuses("/model/merges/0", "ab", "merges: [0] is \"ab\"");
  refuses("/model/merges/0", "a  b", "wanted");
  refuses("/model/merges/0", 7, "[0] is 7");
  refuses("/model/merges", Json::array({"a b", "a b"}), "stands twice");
  refuses("/model/merges", Json::array(), "without merges");
  refuses("/model/merges", nullptr, "is missing");
  refuses("/model/vocab/b", 0, "taken twice");
  refuses("/model/vocab/b", 5, "allowed are 0 to 3");
  refuses("/model/vocab/b", -1, "allowed are 0 to 3");
  refuses("/model/vocab/b", 1.5, "wanted an integer");
  refuses("/model/vocab/b", uint64_t{18446744073709551615u}, "allowed are 0 to 3");
  refuses("/model/vocab", nullptr, "wanted an object");
  refuses("/added_tokens/0/id", 2, "taken twice");
  refuses("/added_tokens/0/content", "a", "has id 3 here and 0");
  refuses("/added_tokens/0/content", "", "0 bytes");
  refuses("/added_tokens/0/content", std::string(2000, 'x'), "2000 bytes");
  refuses("/added_tokens/0/rstrip", true, "rstrip is on");
  refuses("/model/type", "Unigram", "type Unigram");
  refuses("/model/byte_fallback", true, "pre-tokenizer ByteLevel with byte_fallback");
  refuses("/model/dropout", 0.1, "dropout");
  refuses("/model/unk_token", "?", "\"?\" is not in the vocabulary");
  refuses("/model/end_of_word_suffix", "</w>", "is set");
  refuses("/normalizer", Json{{"type", "Lowercase"}}, "normalizer Lowercase");
  refuses("/pre_tokenizer", nullptr, "pre-tokenizer null");
  refuses("/pre_tokenizer", Json{{"type", "Metaspace"}}, "pre-tokenizer Metaspace");
  refuses("/pre_tokenizer/add_prefix_space", true, "add_prefix_space");
  refuses("/pre_tokenizer", Json::parse(R"({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "\\p{L}+"}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "use_regex": false}]})"),
          "\\p{L}+");
  refuses("/post_processor", Json{{"type", "BertProcessing"}}, "BertProcessing");
  for (const char* text :
       {"", "[]", "{", "null", "{\"model\": []}", "{\"model\": {\"type\": \"BPE\"}}", "{\"a\": 1, \"a\": 2}"}) {
    CHECK_THROWS_AS(parse_tokenizer_json(text, "t.json"), Error);
  }
}

TEST_CASE("BPE with byte fallback: the forms of the prefix space", "[tokenizer]") {
  const auto make_with = [](const Json& normalizer, const Json& pre_tokenizer) {
    Json json = tiny();
    json["normalizer"] = normalizer;
    json["pre_tokenizer"] = pre_tokenizer;
    json["model"]["byte_fallback"] = true;
    json["model"]["unk_token"] = "<end>";
    json["model"]["vocab"] = {{"a", 0}, {"b", 1}, {"ab", 2}, {"\u2581", 4}, {"\u2581a", 5}, {"<0x0A>", 6}};
    json["model"]["merges"] = {"a b", "\u2581 a"};
    return make(json);
  };
  using Ids = std::vector<int32_t>;
  const Json prepend = Json::parse(R"({"type": "Prepend", "prepend": "\u2581"})");
  const Json replace = Json::parse(R"({"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"})");
  const Json doubling =
      Json::parse(R"({"type": "Replace", "pattern": {"Regex": "\\A\u2581"}, "content": "\u2581\u2581"})");
  const auto sequence = [](const Json& list) { return Json{{"type", "Sequence"}, {"normalizers", list}}; };
  const auto metaspace = [](const char* scheme, bool split = false) {
    return Json{{"type", "Metaspace"}, {"replacement", "\u2581"}, {"prepend_scheme", scheme}, {"split", split}};
  };
  const auto first = make_with(nullptr, metaspace("first"));
  CHECK(first->kind() == "bpe/metaspace");
  CHECK(first->encode("a<end>a a", true) == Ids{5, 3, 0, 5});
  CHECK(first->encode(" a") == Ids{5});
  CHECK(first->encode("\n?b") == Ids{4, 6, 3, 1});
  CHECK(first->decode(first->encode("ab \nb")) == "ab \nb");
  CHECK(make_with(nullptr, metaspace("always"))->encode("a<end>a", true) == Ids{5, 3, 5});
  CHECK(make_with(nullptr, metaspace("never"))->encode("ab") == Ids{2});
  CHECK(make_with(sequence({prepend, replace}), nullptr)->encode(" a<end>a", true) == Ids{4, 5, 3, 5});
  CHECK(make_with(sequence({replace, doubling}), metaspace("always"))->encode(" a<end> a", true) == Ids{4, 5, 3, 4, 5});
  CHECK(make_with(replace, nullptr)->encode("a a") == Ids{0, 5});
  CHECK_THROWS_WITH(make_with(sequence({replace, doubling}), metaspace("first")), Contains("doubles U+2581"));
  CHECK_THROWS_WITH(make_with(prepend, metaspace("first")), Contains("prepends already"));
  CHECK_THROWS_WITH(make_with(nullptr, metaspace("first", true)), Contains("split: is on"));
  CHECK_THROWS_WITH(make_with(nullptr, metaspace("last")), Contains("prepend_scheme: is last"));
  CHECK_THROWS_WITH(make_with(Json{{"type", "NFKC"}}, nullptr), Contains("normalizer NFKC is not supported"));
}

TEST_CASE("a Hugging Face folder: special tokens from all its files", "[tokenizer]") {
  Folder folder;
  CHECK_THROWS_WITH(load_tokenizer(folder.path.string()), Contains("neither tokenizer.json nor tokenizer.model"));
  CHECK_THROWS_WITH(load_tokenizer((folder.path / "none").string()), Contains("no such file"));
  folder.write("tokenizer.json", tiny().dump());
  folder.write("tokenizer_config.json", R"({"bos_token": null, "eos_token": {"content": "<end>"}, "chat_template": [
    {"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]})");
  folder.write("generation_config.json", R"({"eos_token_id": [1, 3]})");
  const auto tokenizer = load_tokenizer(folder.path.string());
  CHECK(tokenizer->special().eos == 3);
  CHECK(tokenizer->special().bos == -1);
  CHECK(tokenizer->special().stop == std::vector<int32_t>{1, 3});
  CHECK(tokenizer->chat_template() == "y");
  folder.write("tokenizer_config.json", R"({"eos_token": "<no>"})");
  CHECK_THROWS_WITH(load_tokenizer(folder.path.string()), Contains("tokenizer_config.json: eos_token: \"<no>\""));
  folder.write("tokenizer_config.json", R"({"tokenizer_class": "LlamaTokenizer", "add_bos_token": true})");
  CHECK_THROWS_WITH(load_tokenizer(folder.path.string()), Contains("no file names a BOS token"));
  folder.write("tokenizer_config.json", "{}");
  folder.write("generation_config.json", R"({"eos_token_id": 9})");
  CHECK_THROWS_WITH(load_tokenizer(folder.path.string()),
                    Contains("generation_config.json: eos_token_id: is 9, but the tokenizer has 4 tokens"));
}

TEST_CASE("added tokens: what contradicts the vocabulary is refused by file and place", "[tokenizer]") {
  Folder folder;
  folder.write("tokenizer.json", tiny().dump());
  const auto refuses_folder = [&](const std::string& message) {
    CHECK_THROWS_WITH(load_tokenizer(folder.path.string()), Contains(message));
  };
  folder.write("added_tokens.json", R"({"<x>": 5})");
  refuses_folder("added_tokens.json: \"<x>\": \"<x>\" has id 5, but no token has id 4");
  folder.write("added_tokens.json", R"({"<x>": 2})");
  refuses_folder("\"<x>\" has id 2 here, which is \"ab\" in the vocabulary");
  folder.write("added_tokens.json", R"({"ab": 4})");
  refuses_folder("\"ab\" has id 4 here and 2 in the vocabulary");
  folder.write("added_tokens.json", R"({"<x>": -1})");
  refuses_folder("added_tokens.json: \"<x>\": is -1");
  folder.write("added_tokens.json", R"(["<x>"])");
  refuses_folder("wanted an object");
  folder.write("added_tokens.json", R"({"<x>": 4})");
  CHECK(load_tokenizer(folder.path.string())->encode("a<x>b") == std::vector<int32_t>{0, 4, 1});
  folder.write("tokenizer_config.json", R"({"added_tokens_decoder": {"4": {"content": "<y>"}}})");
  refuses_folder("added_tokens_decoder \"4\": \"<y>\" has id 4 here, which is \"<x>\" in the vocabulary");
  folder.write("tokenizer_config.json", R"({"added_tokens_decoder": {"4x": {"content": "<y>"}}})");
  refuses_folder("the key is no token id");
  folder.write("tokenizer_config.json", R"({"added_tokens_decoder": {"5": {"content": "<y>", "lstrip": true}}})");
  refuses_folder("lstrip is on");
  // The union of both files; the later one goes on where the first ends.
  folder.write("tokenizer_config.json",
               R"({"added_tokens_decoder": {"5": {"content": "<y>", "special": true}}, "eos_token": "<y>"})");
  const auto tokenizer = load_tokenizer(folder.path.string());
  CHECK(tokenizer->size() == 6);
  CHECK(tokenizer->special().eos == 5);
  CHECK(tokenizer->encode("<x><y>", true) == std::vector<int32_t>{4, 5});
}

TEST_CASE("an EOS id behind the pieces of tokenizer.model is an added token", "[tokenizer]") {
  Folder folder;
  folder.write("tokenizer.model", read_file(token_golden_path("spm.model")));
  folder.write("generation_config.json", R"({"eos_token_id": [2, 1201]})");
  CHECK_THROWS_WITH(load_tokenizer(folder.path.string()),
                    Contains("eos_token_id[1]: is 1201") && Contains("1200 tokens"));
  folder.write("added_tokens.json", R"({"<|im_start|>": 1200, "<|im_end|>": 1201})");
  const auto tokenizer = load_tokenizer(folder.path.string());
  CHECK(tokenizer->size() == 1202);
  CHECK(tokenizer->special().stop == std::vector<int32_t>{2, 1201});
  CHECK(tokenizer->piece(1201) == "<|im_end|>");
  CHECK(tokenizer->decode({1201, 500}) == "<|im_end|>" + tokenizer->piece(500));
  CHECK_THROWS_WITH(tokenizer->piece(1202), Contains("vocabulary of 1202"));
}

TEST_CASE("the tokenizer's own files go before config.json about BOS and EOS", "[tokenizer]") {
  Folder folder;
  folder.write("tokenizer.model", read_file(token_golden_path("spm.model")));
  const auto special = [&] { return load_tokenizer(folder.path.string())->special(); };
  for (const char* name : {"config.json", "generation_config.json"}) {
    folder.write(name, R"({"bos_token_id": 0, "eos_token_id": 1})");
    for (const char* config : {"{}", R"({"bos_token": "", "eos_token": "", "tokenizer_class": "LLaMATokenizer"})",
                               R"({"bos_token": "<s>", "eos_token": "</s>"})"}) {
      INFO(name << " " << config);
      folder.write("tokenizer_config.json", config);
      CHECK(special().add_bos);
      CHECK(special().bos == 1);
      CHECK(special().eos == 2);
      CHECK(special().stop == std::vector<int32_t>{2});  // config's 1 is the BOS token
    }
  }
  folder.write("tokenizer_config.json", R"({"bos_token": "<none>"})");
  CHECK_THROWS_WITH(special(), Contains("tokenizer_config.json: bos_token: \"<none>\" is not in the vocabulary"));
}

TEST_CASE("the tokenizer's class decides whether add_bos_token or the template of tokenizer.json holds",
          "[tokenizer]") {
  Folder folder;
  Json with = tiny(), without = tiny();
  with["post_processor"] = Json::parse(R"({"type": "TemplateProcessing", "pair": [],
    "single": [{"SpecialToken": {"id": "<end>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "special_tokens": {"<end>": {"id": "<end>", "ids": [3], "tokens": ["<end>"]}}})");
  const auto adds = [&](bool in_template, const Json& flag, const Json& tokenizer_class, const char* in_config = "{}") {
    folder.write("tokenizer.json", (in_template ? with : without).dump());
    Json config = {{"bos_token", "<end>"}};
    if (!flag.is_null()) config["add_bos_token"] = flag;
    if (!tokenizer_class.is_null()) config["tokenizer_class"] = tokenizer_class;
    folder.write("tokenizer_config.json", config.dump());
    folder.write("config.json", in_config);
    return load_tokenizer(folder.path.string())->special().add_bos;
  };
  for (const Json& other :
       {Json("PreTrainedTokenizerFast"), Json("Qwen2Tokenizer"), Json("TokenizersBackend"), Json()}) {
    for (const Json& flag : {Json(true), Json(false), Json()}) {
      CHECK(adds(true, flag, other));
      CHECK_FALSE(adds(false, flag, other));
    }
  }
  // transformers 4; where the two contradict each other, transformers 5 asks the template here too.
  for (const char* llama : {"LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer"}) {
    CHECK(adds(false, true, llama));
    CHECK_FALSE(adds(true, false, llama));
    CHECK(adds(true, nullptr, llama));
    CHECK_FALSE(adds(false, nullptr, llama));
  }
  CHECK_FALSE(adds(true, false, nullptr, R"({"tokenizer_class": "LlamaTokenizer"})"));
  with["post_processor"]["special_tokens"]["<end>"]["ids"] = {2};
  CHECK_THROWS_WITH(adds(true, nullptr, nullptr), Contains("special_tokens <end>: ids are [2]"));
  with["post_processor"]["single"].insert(with["post_processor"]["single"].begin(),
                                          with["post_processor"]["single"][0]);
  CHECK_THROWS_WITH(adds(true, nullptr, nullptr), Contains("more than one token"));
}

TEST_CASE("a Hugging Face folder with tokenizer.model", "[tokenizer]") {
  Folder folder;
  folder.write("tokenizer.model", read_file(token_golden_path("spm.model")));
  folder.write("tokenizer_config.json", R"({"bos_token": "<s>", "eos_token": "</s>"})");
  const auto tokenizer = load_tokenizer(folder.path.string());
  CHECK(tokenizer->kind() == "sentencepiece");
  CHECK(tokenizer->special().add_bos);
  CHECK(tokenizer->special().bos == 1);
  CHECK(tokenizer->special().stop == std::vector<int32_t>{2});
  folder.write("generation_config.json", R"({"eos_token_id": 1200})");
  CHECK_THROWS_WITH(load_tokenizer(folder.path.string()), Contains("1200"));
  folder.write("tokenizer.model", "not a model");
  CHECK_THROWS_AS(load_tokenizer(folder.path.string()), Error);
  folder.write("tokenizer.model", "");
  CHECK_THROWS_AS(load_tokenizer(folder.path.string()), Error);
}

TEST_CASE("a TemplateProcessing that starts with a token adds BOS", "[tokenizer]") {
  Json json = tiny();
  json["post_processor"] =
      Json::parse(R"({"type": "Sequence", "processors": [{"type": "ByteLevel"}, {"type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<end>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [], "special_tokens": {}}]})");
  const TokenizerData data = parse_tokenizer_json(json.dump(), "t.json");
  CHECK(data.special.add_bos);
  CHECK(data.special.bos == 3);
}

// n log n merging takes a second for all of these; a quadratic one would run into ctest's time limit.
TEST_CASE("words of a megabyte", "[tokenizer]") {
  const std::string path = token_golden_path("llama-bpe.tokenizer.json");
  const auto bpe = make_bpe_tokenizer(parse_tokenizer_json(read_file(path), path));
  std::string random;
  Rng rng(1);
  while (random.size() < 1'000'000) random += static_cast<char>('a' + rng.below(26));
  std::string newlines;
  while (newlines.size() < 1'000'000) newlines += " \n";
  for (const std::string& text :
       {random, std::string(1'000'000, 'a'), std::string(1'000'000, ' '), newlines, std::string(1'000'000, '!')}) {
    CHECK(bpe->decode(bpe->encode(text)) == text);
  }
  CHECK(bpe->decode({bpe->size(), 5, bpe->size() + 7}) == bpe->piece(5));  // padded rows of a model have no text
  CHECK_THROWS_WITH(bpe->decode({-1}), Contains("token id -1"));
}

TEST_CASE("SentencePiece vocabularies: unused pieces, missing bytes, bad scores", "[tokenizer]") {
  TokenizerData data;
  data.where = "g.gguf";
  data.tokens = {"<unk>", "a", "b", "ab", "abb"};
  data.types = {TokenType::kUnknown, TokenType::kNormal, TokenType::kNormal, TokenType::kUnused, TokenType::kNormal};
  data.scores = {0, -5, -6, -1, -2};
  data.prefix.where = PrefixSpace::Where::kNever;
  CHECK(make_spm_tokenizer(data)->encode("abb") == std::vector<int32_t>{4});    // built through the unused piece
  CHECK(make_spm_tokenizer(data)->encode("ab") == std::vector<int32_t>{1, 2});  // which is taken apart again
  CHECK(make_spm_tokenizer(data)->encode("a?") == std::vector<int32_t>{1, 0});
  TokenizerData none = data;
  none.types[0] = TokenType::kControl;
  CHECK_THROWS_WITH(make_spm_tokenizer(none), Contains("no byte token <0x00>"));
  TokenizerData bad = data;
  bad.scores[2] = std::numeric_limits<float>::quiet_NaN();
  CHECK_THROWS_WITH(make_spm_tokenizer(bad), Contains("score of token 2"));
  bad = data;
  bad.scores.pop_back();
  CHECK_THROWS_WITH(make_spm_tokenizer(bad), Contains("4 scores for 5 tokens"));
  bad = data;
  bad.tokens[2] = "a";
  CHECK_THROWS_WITH(make_spm_tokenizer(bad), Contains("stands twice"));
  bad = data;
  bad.types[2] = TokenType::kByte;
  CHECK_THROWS_WITH(make_spm_tokenizer(bad), Contains("<0x00> to <0xFF>"));
}

TEST_CASE("text that is not UTF-8 is refused with the offset", "[tokenizer]") {
  const auto tokenizer = make(tiny());
  for (const char* text : {"ab\x80", "ab\xc0\xaf", "ab\xed\xa0\x80", "ab\xf4\x90\x80\x80", "ab\xe2\x82", "ab\xff"}) {
    CHECK_THROWS_WITH(tokenizer->encode(text), Contains("offset 2"));
  }
}

TEST_CASE("mutated files end in an Error or in a tokenizer that works", "[tokenizer]") {
  const std::string whole = read_file(token_golden_path("qwen2.tokenizer.json"));
  const std::string small = tiny().dump();
  Rng rng(7);
  int accepted = 0, refused = 0;
  const auto run = [&](std::string text, int edits) {
    for (int e = 0; e < edits; ++e) {
      const size_t at = rng.below(text.size());
      switch (rng.below(4)) {
        case 0:
          text[at] = static_cast<char>(rng.below(256));
          break;
        case 1:
          text.erase(at, 1 + rng.below(8));
          break;
        case 2:
          text.insert(at, text.substr(rng.below(text.size()), 1 + rng.below(12)));
          break;
        default:
          text[at] = "0123456789{}[],:\"\\"[rng.below(18)];
          break;
      }
      if (text.empty()) text = "x";
    }
    try {
      const auto tokenizer = make_bpe_tokenizer(parse_tokenizer_json(text, "m.json"));
      (void)tokenizer->decode(tokenizer->encode("ab ba<end> \xc3\xa9 12", true));
      ++accepted;
    } catch (const Error&) { ++refused; }
  };
  for (int i = 0; i < 4000; ++i) run(small, 1 + static_cast<int>(rng.below(3)));
  for (int i = 0; i < 40; ++i) run(whole, 1);
  CHECK(accepted >= 10);
  CHECK(refused >= 1000);
}

TEST_CASE("mutated tokenizer.model files end in an Error or in a tokenizer that works", "[tokenizer]") {
  Folder folder;
  const std::string whole = read_file(token_golden_path("spm.model"));
  Rng rng(8);
  int refused = 0;
  for (int i = 0; i < 400; ++i) {
    std::string text = whole;
    for (int e = 0; e < 3; ++e) text[rng.below(text.size())] = static_cast<char>(rng.below(256));
    if (i % 8 == 0) text.resize(rng.below(text.size()));
    folder.write("tokenizer.model", text);
    try {
      const auto tokenizer = load_tokenizer(folder.path.string());
      (void)tokenizer->decode(tokenizer->encode("a tool \xc3\xa9 12", true));
    } catch (const Error&) { ++refused; }
  }
  CHECK(refused >= 50);
}
