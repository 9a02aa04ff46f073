// Chat templates of real checkpoints, by name. There is no Jinja here: a file's template is reduced to a normal form
// (comments, formatting and the spelling of string literals do not count) and the SHA-256 of that form must be known.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "model/tokenizer.h"

namespace vqkv {

struct ChatMessage {
  std::string role;  // "system", "user", "assistant"; ChatML templates take any
  std::string content;
};

// "smollm2", "chatml", "qwen2", "qwen2.5", "llama3", "llama3.1", "llama2", "mistral-v0.1", "mistral-v0.2"; "" when the
// template is not known.
std::string_view chat_template_name(std::string_view chat_template);
std::vector<std::string_view> chat_template_names();

// What the named template renders without tools; `bos` and `eos` are the texts of those tokens. kUsage: an unknown
// name, no messages, roles that the template does not take or not in this order.
std::string render_chat(std::string_view name, const std::vector<ChatMessage>& messages, bool add_generation_prompt,
                        const std::string& bos, const std::string& eos);
// With the tokenizer's own template; kBadData when it has none or an unknown one.
std::string render_chat(const Tokenizer& tokenizer, const std::vector<ChatMessage>& messages,
                        bool add_generation_prompt);
// The ids of the above, special tokens recognised (also in the messages, as Hugging Face does), with exactly one BOS
// where the template or the tokenizer adds one.
std::vector<int32_t> encode_chat(const Tokenizer& tokenizer, const std::vector<ChatMessage>& messages,
                                 bool add_generation_prompt);

// The normal form; two templates with one form render alike.
std::string chat_template_normal_form(std::string_view chat_template);

}  // namespace vqkv
