// A tokenizer.json of any content ends in an Error or in a tokenizer that encodes and decodes. The input may hold the
// text to tokenize behind a zero byte.
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "core/error.h"
#include "core/log.h"
#include "model/chat_template.h"
#include "model/tokenizer_data.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  vqkv::set_log_level(vqkv::LogLevel::kQuiet);
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  const size_t zero = input.find('\0');
  const std::string_view json = input.substr(0, zero);
  const std::string_view text = zero == std::string_view::npos ? "a b1 <end>" : input.substr(zero + 1);
  (void)vqkv::chat_template_normal_form(text);
  try {
    vqkv::TokenizerData parsed = vqkv::parse_tokenizer_json(json, "fuzz");
    vqkv::SideFiles side;
    side.tokenizer_config = side.generation_config = json;
    vqkv::apply_side_files(parsed, side);
    const auto tokenizer = vqkv::make_bpe_tokenizer(std::move(parsed));
    (void)tokenizer->decode(tokenizer->encode(text, true), true);
    (void)tokenizer->encode(text, false);
  } catch (const vqkv::Error&) {}
  return 0;
}
