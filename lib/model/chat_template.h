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
  std::string role;  // "system", "user", "assistant"; some ChatML and Llama 3 templates take any
  std::string content;
};

// What stands behind the messages: nothing, or the opening of the model's answer. Without thinking is Qwen3's
// enable_thinking=false: an empty block of thoughts opens the answer.
enum class ChatPrompt { kNone, kAnswer, kAnswerWithoutThinking };

// The names of docs/chat-templates.md; "" when the template is not known.
std::string_view chat_template_name(std::string_view chat_template);
std::vector<std::string_view> chat_template_names();

// What the named template renders without tools; `bos` and `eos` are the texts of those tokens. llama3.1 and llama3.2
// always print "26 Jul 2024", the templates' own date where no clock is given: a prompt must not change overnight.
// kUsage: an unknown name, no messages, roles that the template does not take or not in this order, a prompt without
// thinking for a template that has no such switch.
std::string render_chat(std::string_view name, const std::vector<ChatMessage>& messages, ChatPrompt prompt,
                        const std::string& bos, const std::string& eos);
// With the tokenizer's own template; kBadData when it has none or an unknown one.
std::string render_chat(const Tokenizer& tokenizer, const std::vector<ChatMessage>& messages, ChatPrompt prompt);
// The ids of the above, special tokens recognised (also in the messages, as Hugging Face does), with exactly one BOS
// where the template or the tokenizer adds one.
std::vector<int32_t> encode_chat(const Tokenizer& tokenizer, const std::vector<ChatMessage>& messages,
                                 ChatPrompt prompt);

// The normal form; two templates with one form render alike.
std::string chat_template_normal_form(std::string_view chat_template);

}  // namespace vqkv
