// Cuts text into the words that byte-level BPE works on. The expressions are facts of the published checkpoints.
#pragma once
#include <functional>
#include <memory>
#include <string>
#include <string_view>

namespace vqkv {

class PreTokenizer {
 public:
  // "gpt2", "smollm", "qwen2", "llama-bpe".
  explicit PreTokenizer(const std::string& name);
  ~PreTokenizer();
  PreTokenizer(const PreTokenizer&) = delete;
  PreTokenizer& operator=(const PreTokenizer&) = delete;

  // Calls word(piece) for every word, in order; together they are the whole text, which must be valid UTF-8.
  // Thread-safe. kBadData when a word needs more matching steps than the limit (64 steps a byte and a million).
  void split(std::string_view text, const std::function<void(std::string_view)>& word) const;

  // The expression as tokenizer.json writes it in a Split ("" for gpt2 and smollm, which ByteLevel implies).
  static std::string_view published_pattern(std::string_view name);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace vqkv
