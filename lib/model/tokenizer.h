// Tokenizers: byte-level BPE (gpt2, smollm, qwen2, llama-bpe pre-tokenizers) and SentencePiece-type vocabularies.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace vqkv {

struct SpecialTokens {
  int32_t bos = -1, eos = -1;
  std::vector<int32_t> stop;  // every token that ends generation (eos, end of turn)
  bool add_bos = false;       // the model's own tokenizer prepends BOS
};

class Tokenizer {
 public:
  virtual ~Tokenizer() = default;
  virtual std::string kind() const = 0;  // "bpe/smollm", "spm", ...
  virtual int32_t size() const = 0;
  // Plain text; with parse_special, special tokens written in the text become their ids (chat templates).
  virtual std::vector<int32_t> encode(std::string_view text, bool parse_special = false) const = 0;
  // Models pad their embeddings to round numbers and may draw an id of a padded row: such ids give no bytes, as with
  // transformers (whose decode leaves them out, too). Negative ids are refused.
  virtual std::string decode(const std::vector<int32_t>& ids, bool skip_special = false) const = 0;
  virtual std::string piece(int32_t id) const = 0;  // the bytes of one token; kBadData for a padded id
  bool padded(int32_t id) const { return id >= size(); }
  const SpecialTokens& special() const { return special_; }
  const std::string& chat_template() const { return chat_template_; }

 protected:
  SpecialTokens special_;
  std::string chat_template_;
};

// From a GGUF file or a Hugging Face folder (tokenizer.json or tokenizer.model). An unknown pre-tokenizer is refused by
// name (kBadData).
std::unique_ptr<Tokenizer> load_tokenizer(const std::string& model_path);

}  // namespace vqkv
