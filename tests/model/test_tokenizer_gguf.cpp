// The tokenizer keys of GGUF files written here, right and wrong.
#include <chrono>
#include <filesystem>

#include "core/error.h"
#include "model/tokenizer_gguf.h"
#include "support/catch.h"
#include "support/token_goldens.h"

using namespace vqkv;
using namespace vqkv::testing;
using Catch::Contains;

namespace {

// A GGUF of key-values and no tensors.
class Gguf {
 public:
  void text(const std::string& key, const std::string& value) {
    begin(key, 8);
    string(value);
  }
  void integer(const std::string& key, uint32_t value) {
    begin(key, 4);
    number(value);
  }
  void boolean(const std::string& key, bool value) {
    begin(key, 7);
    bytes_ += static_cast<char>(value);
  }
  void texts(const std::string& key, const std::vector<std::string>& values) {
    array(key, 8, values.size());
    for (const std::string& value : values) string(value);
  }
  void types(const std::vector<int32_t>& values) {
    array("tokenizer.ggml.token_type", 5, values.size());
    for (const int32_t value : values) number(value);
  }
  void scores(const std::vector<float>& values) {
    array("tokenizer.ggml.scores", 6, values.size());
    for (const float value : values) number(value);
  }
  std::unique_ptr<Tokenizer> load() const {
    const auto path =
        std::filesystem::temp_directory_path() /
        ("vqkv-tokens-" + std::to_string(std::chrono::steady_clock::now().time_since_epoch().count()) + ".gguf");
    std::string file = "GGUF";
    const auto add = [&](auto v) { file.append(reinterpret_cast<const char*>(&v), sizeof v); };
    add(uint32_t{3});
    add(int64_t{0});
    add(count_);
    file += bytes_;
    file.resize((file.size() + 31) / 32 * 32);
    write_file(path.string(), file);
    struct Remove {
      std::filesystem::path p;
      ~Remove() { std::filesystem::remove(p); }
    } remove{path};
    return load_tokenizer(path.string());
  }

 private:
  template <class T>
  void number(T v) {
    bytes_.append(reinterpret_cast<const char*>(&v), sizeof v);
  }
  void string(const std::string& s) {
    number(static_cast<uint64_t>(s.size()));
    bytes_ += s;
  }
  void begin(const std::string& key, uint32_t type) {
    string(key);
    number(type);
    ++count_;
  }
  void array(const std::string& key, uint32_t type, size_t n) {
    begin(key, 9);
    number(type);
    number(static_cast<uint64_t>(n));
  }
  std::string bytes_;
  int64_t count_ = 0;
};

Gguf bpe(const std::string& pre, const std::vector<std::string>& merges = {"a b"}) {
  Gguf g;
  g.text("tokenizer.ggml.model", "gpt2");
  g.text("tokenizer.ggml.pre", pre);
  g.texts("tokenizer.ggml.tokens", {"a", "b", "ab", "<|eot_id|>", "<tool>"});
  g.types({1, 1, 1, 3, 4});
  g.texts("tokenizer.ggml.merges", merges);
  return g;
}

}  // namespace

TEST_CASE("GGUF: byte-level BPE", "[tokenizer][gguf]") {
  Gguf g = bpe("gpt-2");
  g.integer("tokenizer.ggml.eos_token_id", 1);
  g.integer("tokenizer.ggml.eot_token_id", 0);
  g.text("tokenizer.chat_template", "{{ x }}");
  const auto tokenizer = g.load();
  CHECK(tokenizer->kind() == "bpe/gpt2");
  CHECK(tokenizer->special().stop == std::vector<int32_t>{0, 1, 3});
  CHECK_FALSE(tokenizer->special().add_bos);
  CHECK(tokenizer->chat_template() == "{{ x }}");
  CHECK(tokenizer->encode("ab<tool>ba<|eot_id|>", true) == std::vector<int32_t>{2, 4, 1, 0, 3});
  CHECK(tokenizer->encode("ab<tool>") == std::vector<int32_t>{2, 4});  // user-defined tokens always count
  CHECK(bpe("qwen2").load()->kind() == "bpe/qwen2");
}

TEST_CASE("GGUF: Llama 3 adds BOS unless the file says no", "[tokenizer][gguf]") {
  CHECK_THROWS_WITH(bpe("llama-bpe").load(), Contains("bos_token_id is missing"));
  Gguf g = bpe("llama-bpe");
  g.integer("tokenizer.ggml.bos_token_id", 3);
  CHECK(g.load()->special().add_bos);
  Gguf no = bpe("llama-bpe");
  no.boolean("tokenizer.ggml.add_bos_token", false);
  CHECK_FALSE(no.load()->special().add_bos);
}

TEST_CASE("GGUF: what is wrong is named", "[tokenizer][gguf]") {
  CHECK_THROWS_WITH(Gguf().load(), Contains("no tokenizer in this GGUF"));
  CHECK_THROWS_WITH(bpe("falcon").load(), Contains("pre-tokenizer \"falcon\"") && Contains("smollm"));
  CHECK_THROWS_WITH(bpe("").load(), Contains("pre-tokenizer \"\""));
  CHECK_THROWS_WITH(bpe("gpt-2", {"ab"}).load(), Contains("merges[0] is \"ab\""));
  CHECK_THROWS_WITH(bpe("gpt-2", {"a b", "a q"}).load(),
                    Contains("merge 1") && Contains("\"q\" is not in the vocabulary"));
  CHECK_THROWS_WITH(bpe("gpt-2", {}).load(), Contains("without merges"));
  Gguf far = bpe("gpt-2");
  far.integer("tokenizer.ggml.eos_token_id", 5);
  CHECK_THROWS_WITH(far.load(), Contains("tokenizer.ggml.eos_token_id"));
  Gguf other;
  other.text("tokenizer.ggml.model", "bert");
  CHECK_THROWS_WITH(other.load(), Contains("\"bert\"") && Contains("supported: gpt2"));
  Gguf types;
  types.text("tokenizer.ggml.model", "gpt2");
  types.texts("tokenizer.ggml.tokens", {"a", "b"});
  types.types({1, 9});
  CHECK_THROWS_WITH(types.load(), Contains("token_type[1] is 9"));
  Gguf no_scores;
  no_scores.text("tokenizer.ggml.model", "llama");
  no_scores.texts("tokenizer.ggml.tokens", {"a"});
  CHECK_THROWS_WITH(no_scores.load(), Contains("scores is missing"));
}

TEST_CASE("GGUF: a SentencePiece vocabulary equals libsentencepiece", "[tokenizer][gguf]") {
  const Json vocabulary = token_golden("spm.vocab.json");
  Gguf g;
  g.text("tokenizer.ggml.model", "llama");
  g.texts("tokenizer.ggml.tokens", vocabulary["tokens"].get<std::vector<std::string>>());
  g.scores(vocabulary["scores"].get<std::vector<float>>());
  g.types(vocabulary["types"].get<std::vector<int32_t>>());
  g.integer("tokenizer.ggml.bos_token_id", 1);
  g.integer("tokenizer.ggml.eos_token_id", 2);
  const auto tokenizer = g.load();
  CHECK(tokenizer->special().add_bos);
  CHECK(tokenizer->special().stop == std::vector<int32_t>{2});
  const TokenComparison result = compare_tokens(*tokenizer, "spm", false);
  CHECK(result.strings >= 300);
  CHECK(result.differences.empty());
}
