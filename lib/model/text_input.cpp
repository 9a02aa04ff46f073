#include "model/text_input.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <filesystem>

#include "core/error.h"
#include "core/log.h"
#include "core/names.h"
#include "io/atomic_file.h"
#include "model/tokenizer_data.h"

namespace vqkv {
std::vector<int32_t> parse_token_ids(std::string_view text, int32_t vocab, const std::string& where) {
  std::vector<int32_t> out;
  const char* at = text.data();
  const char* end = at + text.size();
  const auto space = [](char c) { return c == ' ' || c == '\n' || c == '\r' || c == '\t'; };
  const auto separator = [&](char c) { return space(c) || c == ','; };
  const auto fail_at = [&](const char* place, const char* what) {
    fail_data(fmt::format("{}: byte {}: {}", where, place - text.data(), what));
  };
  while (at < end && space(*at)) ++at;
  while (end > at && space(end[-1])) --end;
  const bool array = at < end && *at == '[';
  if (array) {  // a file that was cut off must not pass for a shorter one
    if (end - at < 2 || end[-1] != ']') fail_at(end, "the JSON array is not closed");
    ++at;
    --end;
  }
  while (true) {
    int commas = 0;
    for (; at < end && separator(*at); ++at) commas += *at == ',';
    if (array && commas != (at == end || out.empty() ? 0 : 1)) fail_at(at, "an array has one comma between two ids");
    if (at == end) return out;
    int32_t id = 0;
    const auto r = std::from_chars(at, end, id);
    if (r.ec != std::errc() || (r.ptr < end && !separator(*r.ptr)))
      fail_data(fmt::format("{}: byte {}: not a token id; a file of ids holds decimal numbers, or a JSON array of them",
                            where, at - text.data()));
    if (id < 0 || id >= vocab)
      fail_data(
          fmt::format("{}: byte {}: token id {} is outside the vocabulary of {}", where, at - text.data(), id, vocab));
    out.push_back(id);
    at = r.ptr;
  }
}

const Tokenizer* tokenizer_for(const TextSources& sources, const std::function<const Tokenizer&()>& load) {
  if (!sources.texts.empty() || sources.token_ids.empty()) return &load();
  try {
    return &load();
  } catch (const Error& e) {
    if (e.kind() != ErrorKind::kBadData) throw;
    log_warning(fmt::format("{}; the token ids are used as they are, no BOS is added", e.what()));
    return nullptr;
  }
}

std::vector<TextDocument> read_documents(const TextSources& sources, const Tokenizer* tokenizer, int32_t vocab) {
  if (sources.texts.empty() && sources.token_ids.empty())
    fail_usage("no text was given; use --text FILE or --token-ids FILE");
  refuse_twice("--text", sources.texts);  // errors are over documents
  refuse_twice("--token-ids", sources.token_ids);
  std::vector<TextDocument> out;
  for (const auto& path : sources.texts) {
    VQKV_CHECK(tokenizer != nullptr);
    const std::string text = read_file(path);
    require_utf8(text, path);
    out.push_back({std::filesystem::path(path).filename().string(), tokenizer->encode(text, sources.special)});
  }
  for (const auto& path : sources.token_ids)
    out.push_back({std::filesystem::path(path).filename().string(), parse_token_ids(read_file(path), vocab, path)});
  for (auto& d : out) {
    if (sources.max_tokens > 0 && static_cast<int64_t>(d.tokens.size()) > sources.max_tokens)
      d.tokens.resize(static_cast<size_t>(sources.max_tokens));
    if (d.tokens.empty()) fail_data(fmt::format("{}: holds no token", d.name));
    if (tokenizer && tokenizer->special().add_bos && d.tokens.front() == tokenizer->special().bos)
      log_warning(fmt::format("{}: starts with BOS, so no second one is put there", d.name));
  }
  return out;
}

std::vector<int32_t> with_bos(std::span<const int32_t> ids, const SpecialTokens& special) {
  std::vector<int32_t> out;
  if (special.add_bos && (ids.empty() || ids.front() != special.bos)) out.push_back(special.bos);
  out.insert(out.end(), ids.begin(), ids.end());
  return out;
}

std::vector<int32_t> take_window(std::span<const int32_t> ids, int64_t& at, int64_t context,
                                 const SpecialTokens& special) {
  const std::span<const int32_t> rest = ids.subspan(static_cast<size_t>(at));
  const bool adds = special.add_bos && !rest.empty() && rest.front() != special.bos;
  const std::span<const int32_t> taken =
      rest.first(std::min(rest.size(), static_cast<size_t>(context - (adds ? 1 : 0))));
  at += static_cast<int64_t>(taken.size());
  return with_bos(taken, special);
}

}  // namespace vqkv
