#include "model/chat_template.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cctype>

#include "core/error.h"
#include "core/hash.h"
#include "model/text_input.h"

namespace vqkv {
namespace {

constexpr size_t kMaxTemplate = 1 << 20;

struct Known {
  std::string_view name;
  std::string_view sha256;  // of the normal form
};

// Normal forms of the templates that docs/chat-templates.md lists with their sources.
constexpr std::array kKnown{
    Known{"smollm2", "da272aa86e5dc156cb46cc7a39f84a83b1171e4842bc7d6363d78db595740e4d"},
    Known{"chatml", "acc4ec970d38d658cb0d907edc377fdd1844014224a77646627a4bde17da0270"},
    Known{"qwen2", "7b4ab3c9055b33d25ac670ffc8edd9bfbddefbe326b7d2dd0c804084373c8c58"},
    Known{"qwen2.5", "d4439a160d809fb6ff100e8ceafb90a0d2c2232978b10cdc6f5a069b15a3538f"},
    Known{"qwen3", "11cc79a4dae7d2c9649c8b2485c7994812cc6d163805cb14af3809d121908991"},
    Known{"qwen3", "4eac570283d9006121b02083e92e35d47035b82983782d9a5b1c3b129ebc9e42"},
    Known{"qwen3-2507", "0b06e3fd7be642f0247b797c2601355d53304412f411350e581ed71e700105cc"},
    Known{"llama2", "ddc43a6abd44492578f3efd761aab54436a4e9e2a7ffc52ea171eb0b6191a1fa"},
    Known{"llama2", "c3239eafdcee1dff5d6965392125f64ea780279c65099111572121d35f369131"},
    Known{"llama3", "7d5f4651e93b4fee97b76322a1639fefe0ad5e4877491b454eb1ef6907daece7"},
    Known{"llama3.1", "d40332180be9b83f8f5e3b269304e75b21e935364be58750b3177966c53827bf"},
    Known{"llama3.2", "77b5a1d24817ad88ffe3495b4570f3f77fc626bf59434d31fe8d79063b3d0efc"},
    Known{"mistral-v0.1", "df0ca8f0b82e6dfc141cbb6aaf1f978eb5982e604871986a243acab915ae6e94"},
    Known{"mistral-v0.2", "d5038197bd482aee9be3637b4b24776b24a162aa3af4e7037351a5dc3cfe2b89"},
    Known{"mistral-v1", "64dc100f739de64ffd6c9caa5f90077fb84a22adb137586e9cc731c56eafe706"},
    Known{"zephyr", "da03c86e2b5520c0f70df454065febdc6b128c634b2b5708b87bb937098fe207"},
};

bool is_space(char c) { return c == ' ' || c == '\t' || c == '\n' || c == '\r'; }
bool is_word(char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_'; }

// One quoting for all string literals; spaces only where two words would run together.
std::string normal_expression(std::string_view text) {
  std::string out;
  bool gap = false;
  for (size_t i = 0; i < text.size();) {
    const char c = text[i];
    if (is_space(c)) {
      gap = true;
      ++i;
      continue;
    }
    if (gap && !out.empty() && is_word(out.back()) && is_word(c)) out += ' ';
    gap = false;
    if (c != '\'' && c != '"') {
      out += c;
      ++i;
      continue;
    }
    out += '"';
    for (++i; i < text.size() && text[i] != c; ++i) {
      char literal = text[i];
      if (literal == '\\' && i + 1 < text.size()) {
        const char escaped = text[++i];
        if (escaped == 'n')
          literal = '\n';
        else if (escaped == 't')
          literal = '\t';
        else if (escaped == '\\' || escaped == '\'' || escaped == '"')
          literal = escaped;
        else {
          out += "\\?";
          literal = escaped;
        }  // another escape: kept apart from what it might mean
      }
      if (literal == '"' || literal == '\\') out += '\\';
      out += literal;
    }
    ++i;
    out += '"';
  }
  return out;
}

// Where the tag that opens at `begin` ends (after its closing pair); npos when it does not. Quotes hide a closing pair.
size_t tag_end(std::string_view text, size_t begin) {
  const char kind = text[begin + 1];
  const char close = kind == '{' ? '}' : kind;
  char quote = 0;
  for (size_t i = begin + 2; i + 1 < text.size(); ++i) {
    if (kind != '#' && quote) {
      if (text[i] == '\\')
        ++i;
      else if (text[i] == quote)
        quote = 0;
      continue;
    }
    if (kind != '#' && (text[i] == '\'' || text[i] == '"')) {
      quote = text[i];
      continue;
    }
    if (text[i] == close && text[i + 1] == '}') return i + 2;
  }
  return std::string_view::npos;
}

// Python's str.strip: white space of Unicode, and the four separators U+001C to U+001F.
std::string strip(const std::string& text) {
  static const std::vector<std::string_view> kSpaces{" ",
                                                     "\t",
                                                     "\n",
                                                     "\v",
                                                     "\f",
                                                     "\r",
                                                     "\x1c",
                                                     "\x1d",
                                                     "\x1e",
                                                     "\x1f",
                                                     "\xc2\x85",
                                                     "\xc2\xa0",
                                                     "\xe1\x9a\x80",
                                                     "\xe2\x80\x80",
                                                     "\xe2\x80\x81",
                                                     "\xe2\x80\x82",
                                                     "\xe2\x80\x83",
                                                     "\xe2\x80\x84",
                                                     "\xe2\x80\x85",
                                                     "\xe2\x80\x86",
                                                     "\xe2\x80\x87",
                                                     "\xe2\x80\x88",
                                                     "\xe2\x80\x89",
                                                     "\xe2\x80\x8a",
                                                     "\xe2\x80\xa8",
                                                     "\xe2\x80\xa9",
                                                     "\xe2\x80\xaf",
                                                     "\xe2\x81\x9f",
                                                     "\xe3\x80\x80"};
  std::string_view rest = text;
  for (bool again = true; again;) {
    again = false;
    for (const std::string_view space : kSpaces) {
      if (rest.starts_with(space)) {
        rest.remove_prefix(space.size());
        again = true;
      }
      if (rest.ends_with(space)) {
        rest.remove_suffix(space.size());
        again = true;
      }
    }
  }
  return std::string(rest);
}

[[noreturn]] void fail_role(std::string_view name, size_t at, const ChatMessage& message, std::string_view wanted) {
  fail_usage(fmt::format("chat template {}: message {} has role \"{}\"; {}", name, at, message.role, wanted));
}

void allow_roles(std::string_view name, const std::vector<ChatMessage>& messages) {
  for (size_t i = 0; i < messages.size(); ++i) {
    const std::string& role = messages[i].role;
    if (role != "system" && role != "user" && role != "assistant")
      fail_role(name, i, messages[i], "supported are system, user and assistant");
  }
}

std::string chatml(const std::vector<ChatMessage>& messages, bool answer, std::string_view system) {
  std::string out;
  if (!system.empty() && messages[0].role != "system") out = fmt::format("<|im_start|>system\n{}<|im_end|>\n", system);
  for (const ChatMessage& m : messages) out += fmt::format("<|im_start|>{}\n{}<|im_end|>\n", m.role, m.content);
  if (answer) out += "<|im_start|>assistant\n";
  return out;
}

std::string_view trim_newlines(std::string_view text, bool left, bool right) {
  while (left && text.starts_with('\n')) text.remove_prefix(1);
  while (right && text.ends_with('\n')) text.remove_suffix(1);
  return text;
}

// Earlier answers lose their thoughts; what follows the last question keeps them.
std::string qwen3(std::vector<ChatMessage> messages, ChatPrompt prompt) {
  constexpr std::string_view kOpen = "<think>", kClose = "</think>";
  size_t question = messages.size() - 1;
  for (size_t i = messages.size(); i-- > 0;) {
    const std::string& content = messages[i].content;
    if (messages[i].role != "user" || (content.starts_with("<tool_response>") && content.ends_with("</tool_response>")))
      continue;
    question = i;
    break;
  }
  for (size_t i = 0; i < messages.size(); ++i) {
    ChatMessage& m = messages[i];
    if (m.role != "assistant") continue;
    std::string thoughts, said = m.content;
    if (const size_t close = said.find(kClose); close != std::string::npos) {
      std::string_view before = trim_newlines(std::string_view(m.content).substr(0, close), false, true);
      if (const size_t open = before.rfind(kOpen); open != std::string_view::npos)
        before.remove_prefix(open + kOpen.size());
      thoughts = trim_newlines(before, true, true);
      said = trim_newlines(std::string_view(m.content).substr(m.content.rfind(kClose) + kClose.size()), true, false);
    }
    const bool with_thoughts = i > question && (i + 1 == messages.size() || !thoughts.empty());
    m.content =
        with_thoughts ? fmt::format("<think>\n{}\n</think>\n\n{}", thoughts, trim_newlines(said, true, false)) : said;
  }
  return chatml(messages, prompt != ChatPrompt::kNone, "") +
         (prompt == ChatPrompt::kAnswerWithoutThinking ? "<think>\n\n</think>\n\n" : "");
}

std::string zephyr(const std::vector<ChatMessage>& messages, bool answer, const std::string& eos) {
  std::string out;
  for (const ChatMessage& m : messages) out += fmt::format("<|{}|>\n{}{}\n", m.role, m.content, eos);
  if (answer) out += "<|assistant|>\n";
  return out;
}

std::string llama3(std::string_view name, const std::vector<ChatMessage>& messages, bool answer,
                   const std::string& bos) {
  const bool dated = name != "llama3";
  std::string out = bos;
  const auto turn = [&](const std::string& role, const std::string& content) {
    out += fmt::format("<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>", role, content);
  };
  size_t first = 0;
  if (dated) {
    std::string system = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n";
    if (messages[0].role == "system") system += strip(messages[first++].content);
    turn("system", system);
  }
  for (size_t i = first; i < messages.size(); ++i) {
    if (dated && (messages[i].role == "tool" || messages[i].role == "ipython")) {
      fail_role(name, i, messages[i], "tools are not supported");
    }
    turn(messages[i].role, strip(messages[i].content));
  }
  if (answer) out += "<|start_header_id|>assistant<|end_header_id|>\n\n";
  return out;
}

// Llama 2 and Mistral: users and assistants take turns; the template itself ends where the answer begins.
std::string instruct(std::string_view name, const std::vector<ChatMessage>& messages, const std::string& bos,
                     const std::string& eos) {
  const bool llama = name == "llama2", v1 = name == "mistral-v1";
  const size_t first = (llama || v1) && messages[0].role == "system" ? 1 : 0;
  std::string out = llama ? "" : bos;
  for (size_t i = first; i < messages.size(); ++i) {
    const bool user = (i - first) % 2 == 0;
    if (messages[i].role != (user ? "user" : "assistant"))
      fail_role(name, i, messages[i], user ? "wanted user" : "wanted assistant");
    std::string content = messages[i].content;
    if (first == 1 && i == 1) {
      const std::string& system = messages[0].content;
      content = llama ? fmt::format("<<SYS>>\n{}\n<</SYS>>\n\n{}", system, content) : system + "\n\n" + content;
    }
    if (llama) content = strip(content);
    if (user) {
      out += fmt::format("{}{}[INST] {} [/INST]", llama ? bos : "", v1 ? " " : "", content);
    } else {
      out += fmt::format("{}{}{}{}{}", llama || v1 ? " " : "", content, llama ? " " : "", eos,
                         name == "mistral-v0.1" ? " " : "");
    }
  }
  return out;
}

std::string text_of(const Tokenizer& tokenizer, int32_t id) { return id < 0 ? std::string() : tokenizer.piece(id); }

}  // namespace

// As transformers sets Jinja up: trim_blocks (a block eats the newline behind it) and lstrip_blocks (and the spaces in
// front of it on its line); a "-" eats all white space on its side.
std::string chat_template_normal_form(std::string_view text) {
  std::string out, plain;
  const auto flush = [&] {
    if (!plain.empty()) out += fmt::format("{{>{}<}}", plain);
    plain.clear();
  };
  if (text.ends_with('\n')) text.remove_suffix(1);  // Jinja drops one
  for (size_t i = 0; i < text.size();) {
    const bool opens =
        text[i] == '{' && i + 1 < text.size() && (text[i + 1] == '{' || text[i + 1] == '%' || text[i + 1] == '#');
    const size_t end = opens ? tag_end(text, i) : std::string_view::npos;
    if (end == std::string_view::npos) {
      plain += text[i++];
      continue;
    }
    std::string_view body = text.substr(i + 2, end - i - 4);
    const char kind = text[i + 1];
    const bool trim_left = body.starts_with('-'), trim_right = body.ends_with('-') && body.size() > 1;
    if (trim_left) {
      while (!plain.empty() && is_space(plain.back())) plain.pop_back();
    } else if (kind != '{') {
      size_t keep = plain.size();
      while (keep > 0 && (plain[keep - 1] == ' ' || plain[keep - 1] == '\t')) --keep;
      if (keep == 0 ? out.empty() : plain[keep - 1] == '\n') plain.resize(keep);
    }
    if (trim_left) body.remove_prefix(1);
    if (trim_right) body.remove_suffix(1);
    i = end;
    if (trim_right) {
      while (i < text.size() && is_space(text[i])) ++i;
    } else if (kind != '{' && i < text.size() && text[i] == '\n') {
      ++i;
    }
    if (kind == '#') continue;
    flush();
    out += kind == '{' ? "{{" : "{%";
    out += normal_expression(body);
    out += kind == '{' ? "}}" : "%}";
  }
  flush();
  return out;
}

std::string_view chat_template_name(std::string_view chat_template) {
  if (chat_template.size() > kMaxTemplate) return "";
  const std::string hash = sha256_hex(chat_template_normal_form(chat_template));
  for (const Known& known : kKnown) {
    if (known.sha256 == hash) return known.name;
  }
  return "";
}

std::vector<std::string_view> chat_template_names() {
  std::vector<std::string_view> names;
  for (const Known& known : kKnown) {
    if (std::find(names.begin(), names.end(), known.name) == names.end()) names.push_back(known.name);
  }
  return names;
}

std::string render_chat(std::string_view name, const std::vector<ChatMessage>& messages, ChatPrompt prompt,
                        const std::string& bos, const std::string& eos) {
  const auto names = chat_template_names();
  if (std::find(names.begin(), names.end(), name) == names.end())
    fail_usage(fmt::format("no chat template \"{}\"; known: {}", name, fmt::join(names, ", ")));
  if (messages.empty()) fail_usage("a chat needs at least one message");
  if (prompt == ChatPrompt::kAnswerWithoutThinking && name != "qwen3")
    fail_usage(fmt::format("chat template {}: thinking cannot be switched off; only qwen3 has that switch", name));
  const bool answer = prompt != ChatPrompt::kNone;
  if (name == "chatml") return chatml(messages, answer, "");
  if (name == "smollm2")
    return chatml(messages, answer, "You are a helpful AI assistant named SmolLM, trained by Hugging Face");
  if (name == "qwen2") return chatml(messages, answer, "You are a helpful assistant.");
  if (name == "llama3" || name == "llama3.1" || name == "llama3.2") return llama3(name, messages, answer, bos);
  if (name == "llama2" || name.starts_with("mistral-")) return instruct(name, messages, bos, eos);
  allow_roles(name, messages);
  if (name == "qwen2.5")
    return chatml(messages, answer, "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.");
  if (name == "qwen3") return qwen3(messages, prompt);
  if (name == "qwen3-2507") return chatml(messages, answer, "");
  if (name == "zephyr") return zephyr(messages, answer, eos);
  fail_internal(fmt::format("chat template {} has no renderer", name));
}

std::string render_chat(const Tokenizer& tokenizer, const std::vector<ChatMessage>& messages, ChatPrompt prompt) {
  if (tokenizer.chat_template().empty()) {
    fail_data("this model has no chat template; give the prompt as raw text, with --special in place of --chat");
  }
  const std::string_view name = chat_template_name(tokenizer.chat_template());
  if (name.empty()) {
    fail_data(
        fmt::format("the model's chat template (sha256 {}) is not one of: {}; write the whole prompt with its special "
                    "tokens yourself and give it as raw text, with --special in place of --chat",
                    sha256_hex(tokenizer.chat_template()), fmt::join(chat_template_names(), ", ")));
  }
  const SpecialTokens& special = tokenizer.special();
  return render_chat(name, messages, prompt, text_of(tokenizer, special.bos), text_of(tokenizer, special.eos));
}

std::vector<int32_t> encode_chat(const Tokenizer& tokenizer, const std::vector<ChatMessage>& messages,
                                 ChatPrompt prompt) {
  return with_bos(tokenizer.encode(render_chat(tokenizer, messages, prompt), true), tokenizer.special());
}

}  // namespace vqkv
