#include "model/pre_tokenizer.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <fmt/format.h>
#include <pcre2.h>

#include <algorithm>

#include "core/error.h"

namespace vqkv {
namespace {

constexpr std::string_view kGpt2 = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
constexpr std::string_view kQwen2 =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr std::string_view kLlama3 =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+)"
    R"(|\s+(?!\S)|\s+)";

// PCRE2's \s also takes U+180E, which lost the White_Space property in Unicode 6.3; the published tokenizers use
// engines that follow the property. So \s is spelled out.
constexpr std::string_view kSpaces =
    R"(\x09-\x0d\x20\x85\xa0\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000})";

std::string spell_out_spaces(std::string_view pattern) {
  std::string out;
  bool in_class = false;
  for (size_t i = 0; i < pattern.size(); ++i) {
    if (pattern[i] == '\\' && i + 1 < pattern.size()) {
      const char kind = pattern[++i];
      if (kind == 's') {
        out += in_class ? std::string(kSpaces) : fmt::format("[{}]", kSpaces);
      } else if (kind == 'S') {
        out += fmt::format("[^{}]", kSpaces);
      } else {
        out += {'\\', kind};
      }
      continue;
    }
    if (pattern[i] == '[') in_class = true;
    if (pattern[i] == ']') in_class = false;
    out += pattern[i];
  }
  return out;
}

struct CodeFree {
  void operator()(pcre2_code* p) const { pcre2_code_free(p); }
};
struct MatchDataFree {
  void operator()(pcre2_match_data* p) const { pcre2_match_data_free(p); }
};
struct ContextFree {
  void operator()(pcre2_match_context* p) const { pcre2_match_context_free(p); }
};
struct StackFree {
  void operator()(pcre2_jit_stack* p) const { pcre2_jit_stack_free(p); }
};
using Code = std::unique_ptr<pcre2_code, CodeFree>;

Code compile(std::string_view pattern) {
  int error = 0;
  PCRE2_SIZE at = 0;
  Code code(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(), PCRE2_UTF | PCRE2_UCP, &error,
                          &at, nullptr));
  if (!code) fail_internal(fmt::format("pre-tokenizer expression: PCRE2 error {} at {}", error, at));
  // An error here only means that this PCRE2 has no JIT for this processor; the interpreter gives the same matches.
  (void)pcre2_jit_compile(code.get(), PCRE2_JIT_COMPLETE);
  return code;
}

// One per call of split: match data and the JIT's stack are not shared between threads.
struct Matcher {
  const pcre2_code* code;
  std::unique_ptr<pcre2_match_data, MatchDataFree> data;
  std::unique_ptr<pcre2_match_context, ContextFree> context;
  std::unique_ptr<pcre2_jit_stack, StackFree> stack;

  Matcher(const Code& compiled, size_t text_bytes)
      : code(compiled.get()),
        data(pcre2_match_data_create(1, nullptr)),
        context(pcre2_match_context_create(nullptr)),
        stack(pcre2_jit_stack_create(32 * 1024, 1024 * 1024, nullptr)) {
    if (!data || !context || !stack) throw std::bad_alloc();
    pcre2_jit_stack_assign(context.get(), nullptr, stack.get());
    // Each of the expressions walks back over a run at most once, so this is far above any honest text.
    pcre2_set_match_limit(context.get(),
                          static_cast<uint32_t>(std::min<size_t>(1'000'000 + 64 * text_bytes, 4'000'000'000)));
  }

  // [first, second) of the next match at or after `from`; {size, size} when there is none.
  std::pair<size_t, size_t> next(std::string_view text, size_t from) {
    const int rc = pcre2_match(code, reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), from, PCRE2_NO_UTF_CHECK,
                               data.get(), context.get());
    if (rc == PCRE2_ERROR_NOMATCH) return {text.size(), text.size()};
    if (rc < 0) {
      fail_data(fmt::format("text of {} bytes: the word at byte {} needs too many matching steps (PCRE2 error {})",
                            text.size(), from, rc));
    }
    const PCRE2_SIZE* at = pcre2_get_ovector_pointer(data.get());
    return {at[0], at[1]};
  }

  void split(std::string_view text, const std::function<void(std::string_view)>& word) {
    size_t done = 0;
    while (done < text.size()) {
      const auto [begin, end] = next(text, done);
      if (begin > done) word(text.substr(done, begin - done));  // what no alternative takes is a word of its own
      if (end > begin) word(text.substr(begin, end - begin));
      done = std::max(end, begin);
    }
  }
};

}  // namespace

struct PreTokenizer::Impl {
  Code words;
  Code digits;  // smollm: every numeric character is cut out first
};

PreTokenizer::PreTokenizer(const std::string& name) : impl_(std::make_unique<Impl>()) {
  std::string_view pattern = published_pattern(name);
  if (pattern.empty()) {
    if (name != "gpt2" && name != "smollm") fail_internal("no pre-tokenizer \"" + name + "\"");
    pattern = kGpt2;
  }
  impl_->words = compile(spell_out_spaces(pattern));
  if (name == "smollm") impl_->digits = compile(R"(\p{N})");
}

PreTokenizer::~PreTokenizer() = default;

std::string_view PreTokenizer::published_pattern(std::string_view name) {
  if (name == "qwen2") return kQwen2;
  if (name == "llama-bpe") return kLlama3;
  return "";
}

void PreTokenizer::split(std::string_view text, const std::function<void(std::string_view)>& word) const {
  Matcher words(impl_->words, text.size());
  if (!impl_->digits) {
    words.split(text, word);
    return;
  }
  // A stretch between two digits is a text of its own: spaces in front of a digit stay together.
  Matcher digits(impl_->digits, text.size());
  size_t done = 0;
  while (done < text.size()) {
    const auto [begin, end] = digits.next(text, done);
    words.split(text.substr(done, begin - done), word);
    if (end > begin) word(text.substr(begin, end - begin));
    done = end;
  }
}

}  // namespace vqkv
