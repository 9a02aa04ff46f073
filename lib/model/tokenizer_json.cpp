// tokenizer.json of Hugging Face's `tokenizers`. The pre-tokenizer is recognised by its structure; whatever else would
// change the ids is refused by name.
#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "core/error.h"
#include "core/json.h"
#include "model/json_node.h"
#include "model/pre_tokenizer.h"
#include "model/tokenizer_data.h"

namespace vqkv {
namespace {

constexpr const char* kSupported =
    "supported: ByteLevel (gpt2), Digits + ByteLevel (smollm), Split by the Qwen2 or Llama-3 expression + ByteLevel; "
    "with byte_fallback: none, or Metaspace that does not split";

std::string type_of(const JsonNode& node) { return node.is_null() ? "null" : node.at("type").text(); }

// The members of a Sequence, or the one component itself, or nothing for null.
std::vector<JsonNode> components(const JsonNode& node, const char* list) {
  if (node.is_null()) return {};
  if (type_of(node) == "Sequence") return node.at(list).items();
  return {node};
}

void require_plain_byte_level(const JsonNode& node) {
  if (node.at("add_prefix_space").boolean_or(true)) node.fail("add_prefix_space is on, which is not supported");
}

void read_pre_tokenizer(const JsonNode& root, TokenizerData& data) {
  const JsonNode node = root.at("pre_tokenizer");
  std::vector<std::string> types;
  const auto parts = components(node, "pretokenizers");
  for (const JsonNode& part : parts) types.push_back(type_of(part));
  const auto is = [&](const std::vector<std::string>& wanted) { return types == wanted; };
  if (is({"ByteLevel"}) && parts[0].at("use_regex").boolean_or(true)) {
    require_plain_byte_level(parts[0]);
    data.pre = "gpt2";
    return;
  }
  if (is({"Digits", "ByteLevel"}) && parts[0].at("individual_digits").boolean_or(false) &&
      parts[1].at("use_regex").boolean_or(true)) {
    require_plain_byte_level(parts[1]);
    data.pre = "smollm";
    return;
  }
  if (is({"Split", "ByteLevel"}) && !parts[1].at("use_regex").boolean_or(true)) {
    require_plain_byte_level(parts[1]);
    const JsonNode pattern = parts[0].at("pattern").at("Regex");
    const std::string text = pattern.text();
    for (const char* name : {"qwen2", "llama-bpe"}) {
      if (text == PreTokenizer::published_pattern(name) && parts[0].at("behavior").text() == "Isolated" &&
          !parts[0].at("invert").boolean_or(false)) {
        data.pre = name;
        return;
      }
    }
    pattern.fail(fmt::format("the pre-tokenizer expression {} is not supported; {}", text, kSupported));
  }
  std::string found;
  for (const std::string& type : types) found += (found.empty() ? "" : " + ") + type;
  node.fail(fmt::format("pre-tokenizer {} is not supported; {}", found.empty() ? "null" : found, kSupported));
}

void read_normalizer(const JsonNode& root, TokenizerData& data) {
  for (const JsonNode& part : components(root.at("normalizer"), "normalizers")) {
    const std::string type = type_of(part);
    if (type != "NFC") part.fail(fmt::format("normalizer {} is not supported; supported: NFC or none", type));
    data.nfc = true;
  }
}

// How a SentencePiece vocabulary puts its prefix space, in the forms that transformers 4 and 5 write: a normalizer that
// prepends, or Metaspace, with a doubling where that would not be put in front of a space. Other forms are refused.
PrefixSpace read_prefix(const JsonNode& root) {
  PrefixSpace prefix{PrefixSpace::Where::kNever, false, false};
  bool doubles = false;
  for (const JsonNode& part : components(root.at("normalizer"), "normalizers")) {
    const std::string type = type_of(part);
    const auto replaces = [&](const char* kind, const char* what, const char* by) {
      const JsonNode pattern = part.at("pattern").at(kind);
      return !pattern.is_null() && pattern.text() == what && part.at("content").text() == by;
    };
    if (type == "Prepend" && part.at("prepend").text() == "\u2581") {
      prefix = {PrefixSpace::Where::kEvery, true, true};
    } else if (type == "Replace" && replaces("Regex", "\\A\u2581", "\u2581\u2581")) {
      doubles = true;
    } else if (type != "Replace" || !replaces("String", " ", "\u2581")) {
      part.fail(
          fmt::format("normalizer {} is not supported with byte_fallback; supported: Prepend and Replace that write "
                      "spaces as U+2581",
                      type));
    }
  }
  for (const JsonNode& part : components(root.at("pre_tokenizer"), "pretokenizers")) {
    const std::string type = type_of(part);
    if (type != "Metaspace")
      part.fail(fmt::format("pre-tokenizer {} with byte_fallback is not supported; {}", type, kSupported));
    if (part.at("replacement").text() != "\u2581") part.at("replacement").fail("wanted U+2581");
    if (part.at("split").boolean_or(true)) part.at("split").fail("is on, which is not supported");
    const std::string scheme = part.at("prepend_scheme").text();
    if (prefix.by_normalizer) part.fail("stands behind a normalizer that prepends already, which is not supported");
    if (scheme == "always") prefix.where = PrefixSpace::Where::kEvery;
    if (scheme == "first") prefix.where = PrefixSpace::Where::kFirst;
    if (scheme != "always" && scheme != "first" && scheme != "never")
      part.at("prepend_scheme").fail(fmt::format("is {}; wanted always, first or never", scheme));
  }
  if (doubles && prefix.where != PrefixSpace::Where::kEvery)
    root.at("normalizer")
        .fail("doubles U+2581 in front of a text, which is supported with prepend_scheme always alone");
  prefix.before_space |= doubles;
  return prefix;
}

void read_vocabulary(const JsonNode& root, TokenizerData& data) {
  const JsonNode vocabulary = root.at("model").at("vocab");
  const Json& entries = vocabulary.json();
  if (!entries.is_object()) vocabulary.fail("wanted an object of token and id");
  const auto added = root.at("added_tokens").is_null() ? std::vector<JsonNode>() : root.at("added_tokens").items();
  if (static_cast<int64_t>(entries.size() + added.size()) > kMaxTokens) {
    vocabulary.fail(fmt::format("{} tokens; the limit is {}", entries.size() + added.size(), kMaxTokens));
  }
  // Ids are dense, so none can reach the number of entries; that bounds what a hostile id makes us allocate.
  const size_t most = entries.size() + added.size();
  std::vector<bool> taken(most), normalized(most);
  data.tokens.resize(most);
  data.types.assign(most, TokenType::kNormal);
  const auto place = [&](const JsonNode& where, const std::string& token, size_t id) {
    if (taken[id] && data.tokens[id] != token) {
      where.fail(fmt::format("id {} is taken twice, by \"{}\" and \"{}\"", id, data.tokens[id], token));
    }
    taken[id] = true;
    data.tokens[id] = token;
  };
  for (const auto& [token, id] : entries.items()) {
    const JsonNode entry(id, fmt::format("{} \"{}\"", vocabulary.path(), token));
    place(entry, token, static_cast<size_t>(entry.integer(0, static_cast<int64_t>(most) - 1)));
  }
  for (const JsonNode& entry : added) {
    const std::string content = entry.at("content").text();
    const size_t id = static_cast<size_t>(entry.at("id").integer(0, static_cast<int64_t>(most) - 1));
    if (const auto it = entries.find(content); it != entries.end() && *it != id) {
      entry.fail(fmt::format("\"{}\" has id {} here and {} in the vocabulary", content, id, it->dump()));
    }
    place(entry, content, id);
    const AddedToken token = read_added_token(entry, static_cast<int64_t>(id));
    data.types[id] = token.special ? TokenType::kControl : TokenType::kUserDefined;
    normalized[id] = token.normalized;
  }
  const size_t count = static_cast<size_t>(std::count(taken.begin(), taken.end(), true));
  for (size_t id = 0; id < count; ++id) {
    if (!taken[id]) vocabulary.fail(fmt::format("no token has id {}, though there are {} tokens", id, count));
  }
  data.tokens.resize(count);
  data.types.resize(count);
  normalized.resize(count);
  data.after_normalizer = std::move(normalized);
}

void read_merges(const JsonNode& root, TokenizerData& data) {
  const JsonNode list = root.at("model").at("merges");
  if (list.is_null()) list.fail("is missing; byte-level BPE needs it");
  const Json& merges = list.json();
  if (!merges.is_array()) list.fail("wanted an array");
  data.merges.reserve(merges.size());
  for (size_t rank = 0; rank < merges.size(); ++rank) {
    const Json& merge = merges[rank];
    if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
      data.merges.emplace_back(merge[0].get<std::string>(), merge[1].get<std::string>());
      continue;
    }
    const std::string text = merge.is_string() ? merge.get<std::string>() : std::string();
    const size_t space = text.find(' ');
    if (space == std::string::npos || space == 0 || space + 1 == text.size() ||
        text.find(' ', space + 1) != std::string::npos) {
      list.fail(
          fmt::format("[{}] is {}; wanted \"left right\" or [\"left\", \"right\"]", rank, merge.dump().substr(0, 80)));
    }
    data.merges.emplace_back(text.substr(0, space), text.substr(space + 1));
  }
}

// A TemplateProcessing whose single sequence starts with a special token puts that token in front of every text.
void read_post_processor(const JsonNode& root, TokenizerData& data) {
  data.from_json = true;
  for (const JsonNode& part : components(root.at("post_processor"), "processors")) {
    const std::string type = type_of(part);
    if (type == "ByteLevel") continue;
    if (type != "TemplateProcessing") part.fail(fmt::format("post-processor {} is not supported", type));
    const auto single = part.at("single").items();
    const auto special = [&](size_t i) { return i < single.size() && !single[i].at("SpecialToken").is_null(); };
    if (!special(0)) continue;
    if (special(1)) part.fail("puts more than one token in front of a text, which is not supported");
    const std::string token = single[0].at("SpecialToken").at("id").text();
    data.special.bos = find_token(data, token);
    if (data.special.bos < 0) single[0].fail(fmt::format("\"{}\" is not in the vocabulary", token));
    const JsonNode listed = part.at("special_tokens").at(token.c_str());
    if (!listed.is_null()) {
      const auto ids = listed.at("ids").items();
      if (ids.size() != 1 || ids[0].integer(0, kMaxTokens) != data.special.bos)
        listed.fail(fmt::format("ids are {}; the vocabulary has \"{}\" as {}", listed.at("ids").json().dump(), token,
                                data.special.bos));
    }
    data.special.add_bos = true;
  }
}

}  // namespace

AddedToken read_added_token(const JsonNode& entry, int64_t id) {
  AddedToken token{entry.at("content").text(), id, entry.at("special").boolean_or(false),
                   entry.at("normalized").boolean_or(false), entry.path()};
  for (const char* flag : {"single_word", "lstrip", "rstrip"}) {
    if (entry.at(flag).boolean_or(false))
      entry.fail(fmt::format("added token \"{}\": {} is on, which is not supported", token.content, flag));
  }
  return token;
}

TokenizerData parse_tokenizer_json(std::string_view text, const std::string& where) {
  const Json json = parse_json(text, where);
  const JsonNode root(json, where + ":");
  TokenizerData data;
  data.where = where;
  const JsonNode model = root.at("model");
  const std::string type = model.at("type").is_null() ? "BPE" : model.at("type").text();  // early files name none
  if (type != "BPE") model.fail(fmt::format("type {} is not supported; supported: BPE", type));
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    if (!model.at(key).text_or_empty().empty()) model.at(key).fail("is set, which byte-level BPE does not know");
  }
  if (!model.at("dropout").is_null() &&
      !(model.at("dropout").json().is_number() && model.at("dropout").json().get<double>() == 0)) {
    model.at("dropout").fail("is set: the ids would be random");
  }
  if (model.at("byte_fallback").boolean_or(false)) {
    data.pre = kMetaspace;
    data.prefix = read_prefix(root);
  } else {
    read_pre_tokenizer(root, data);
    read_normalizer(root, data);
  }
  data.ignore_merges = model.at("ignore_merges").boolean_or(false);
  data.fuse_unknown = model.at("fuse_unk").boolean_or(false);
  read_vocabulary(root, data);
  read_merges(root, data);
  if (const std::string unknown = model.at("unk_token").text_or_empty(); !unknown.empty()) {
    data.unknown = find_token(data, unknown);
    if (data.unknown < 0) model.at("unk_token").fail(fmt::format("\"{}\" is not in the vocabulary", unknown));
  }
  read_post_processor(root, data);
  return data;
}

void apply_tokenizer_json(TokenizerData& data, std::string_view text, const std::string& where) {
  const Json json = parse_json(text, where);
  const JsonNode root(json, where + ":");
  std::vector<AddedToken> added;
  if (const JsonNode list = root.at("added_tokens"); !list.is_null()) {
    for (const JsonNode& entry : list.items())
      added.push_back(read_added_token(entry, entry.at("id").integer(0, kMaxTokens)));
  }
  add_tokens(data, std::move(added));
  read_post_processor(root, data);
  data.prefix = read_prefix(root);
}

}  // namespace vqkv
