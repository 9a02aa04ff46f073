// tokenizer.json of Hugging Face's `tokenizers`, and tokenizer_config.json and generation_config.json beside it. The
// pre-tokenizer is recognised by its structure; whatever else would change the ids is refused by name.
#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "core/error.h"
#include "core/json.h"
#include "model/added_tokens.h"
#include "model/pre_tokenizer.h"
#include "model/tokenizer_data.h"

namespace vqkv {
namespace {

constexpr int64_t kMaxTokens = 10'000'000;
constexpr const char* kSupported =
    "supported: ByteLevel (gpt2), Digits + ByteLevel (smollm), Split by the Qwen2 or Llama-3 expression + ByteLevel";

// One value of the file with its path, so that every message can name the place.
class Node {
 public:
  Node(const Json& json, std::string path) : json_(&json), path_(std::move(path)) {}
  const Json& json() const { return *json_; }
  const std::string& path() const { return path_; }
  bool is_null() const { return json_->is_null(); }

  [[noreturn]] void fail(const std::string& what) const { fail_data(fmt::format("{}: {}", path_, what)); }

  Node at(const char* key) const {
    static const Json kNull;
    if (!json_->is_object()) fail(fmt::format("is {}; wanted an object", json_->type_name()));
    const auto it = json_->find(key);
    return {it == json_->end() ? kNull : *it, fmt::format("{} {}", path_, key)};
  }
  std::vector<Node> items() const {
    if (!json_->is_array()) fail(fmt::format("is {}; wanted an array", json_->type_name()));
    std::vector<Node> out;
    out.reserve(json_->size());
    for (size_t i = 0; i < json_->size(); ++i) out.emplace_back((*json_)[i], fmt::format("{}[{}]", path_, i));
    return out;
  }
  std::string text() const {
    if (!json_->is_string()) fail(fmt::format("is {}; wanted a string", json_->type_name()));
    return json_->get<std::string>();
  }
  std::string text_or_empty() const { return is_null() ? std::string() : text(); }
  bool boolean_or(bool fallback) const {
    if (is_null()) return fallback;
    if (!json_->is_boolean()) fail(fmt::format("is {}; wanted true or false", json_->type_name()));
    return json_->get<bool>();
  }
  int64_t integer(int64_t lowest, int64_t highest) const {
    if (!json_->is_number_integer()) fail(fmt::format("is {}; wanted an integer", json_->type_name()));
    const bool huge = json_->is_number_unsigned() && json_->get<uint64_t>() > uint64_t{INT64_MAX};
    const int64_t value = huge ? INT64_MAX : json_->get<int64_t>();
    if (value < lowest || value > highest) fail(fmt::format("is {}; allowed are {} to {}", value, lowest, highest));
    return value;
  }

 private:
  const Json* json_;
  std::string path_;
};

std::string type_of(const Node& node) { return node.is_null() ? "null" : node.at("type").text(); }

// The members of a Sequence, or the one component itself, or nothing for null.
std::vector<Node> components(const Node& node, const char* list) {
  if (node.is_null()) return {};
  if (type_of(node) == "Sequence") return node.at(list).items();
  return {node};
}

void require_plain_byte_level(const Node& node) {
  if (node.at("add_prefix_space").boolean_or(true)) node.fail("add_prefix_space is on, which is not supported");
}

void read_pre_tokenizer(const Node& root, TokenizerData& data) {
  const Node node = root.at("pre_tokenizer");
  std::vector<std::string> types;
  const auto parts = components(node, "pretokenizers");
  for (const Node& part : parts) types.push_back(type_of(part));
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
    const Node pattern = parts[0].at("pattern").at("Regex");
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

void read_normalizer(const Node& root, TokenizerData& data) {
  for (const Node& part : components(root.at("normalizer"), "normalizers")) {
    const std::string type = type_of(part);
    if (type != "NFC") part.fail(fmt::format("normalizer {} is not supported; supported: NFC or none", type));
    data.nfc = true;
  }
}

void read_vocabulary(const Node& root, TokenizerData& data) {
  const Node vocabulary = root.at("model").at("vocab");
  const Json& entries = vocabulary.json();
  if (!entries.is_object()) vocabulary.fail("wanted an object of token and id");
  const auto added = root.at("added_tokens").is_null() ? std::vector<Node>() : root.at("added_tokens").items();
  if (static_cast<int64_t>(entries.size() + added.size()) > kMaxTokens) {
    vocabulary.fail(fmt::format("{} tokens; the limit is {}", entries.size() + added.size(), kMaxTokens));
  }
  // Ids are dense, so none can reach the number of entries; that bounds what a hostile id makes us allocate.
  const size_t most = entries.size() + added.size();
  std::vector<bool> taken(most), normalized(most);
  data.tokens.resize(most);
  data.types.assign(most, TokenType::kNormal);
  const auto place = [&](const Node& where, const std::string& token, size_t id) {
    if (taken[id] && data.tokens[id] != token) {
      where.fail(fmt::format("id {} is taken twice, by \"{}\" and \"{}\"", id, data.tokens[id], token));
    }
    taken[id] = true;
    data.tokens[id] = token;
  };
  for (const auto& [token, id] : entries.items()) {
    const Node entry(id, fmt::format("{} \"{}\"", vocabulary.path(), token));
    place(entry, token, static_cast<size_t>(entry.integer(0, static_cast<int64_t>(most) - 1)));
  }
  for (const Node& entry : added) {
    const std::string content = entry.at("content").text();
    const size_t id = static_cast<size_t>(entry.at("id").integer(0, static_cast<int64_t>(most) - 1));
    if (const auto it = entries.find(content); it != entries.end() && *it != id) {
      entry.fail(fmt::format("\"{}\" has id {} here and {} in the vocabulary", content, id, it->dump()));
    }
    place(entry, content, id);
    for (const char* flag : {"single_word", "lstrip", "rstrip"}) {
      if (entry.at(flag).boolean_or(false))
        entry.fail(fmt::format("added token \"{}\": {} is on, which is not supported", content, flag));
    }
    data.types[id] = entry.at("special").boolean_or(false) ? TokenType::kControl : TokenType::kUserDefined;
    normalized[id] = entry.at("normalized").boolean_or(false);
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

void read_merges(const Node& root, TokenizerData& data) {
  const Node list = root.at("model").at("merges");
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

int32_t find_token(const TokenizerData& data, const std::string& token) {
  const auto it = std::find(data.tokens.begin(), data.tokens.end(), token);
  return it == data.tokens.end() ? -1 : static_cast<int32_t>(it - data.tokens.begin());
}

// A TemplateProcessing whose single sequence starts with a special token puts that token in front of every text.
void read_post_processor(const Node& root, TokenizerData& data) {
  for (const Node& part : components(root.at("post_processor"), "processors")) {
    const std::string type = type_of(part);
    if (type == "ByteLevel") continue;
    if (type != "TemplateProcessing") part.fail(fmt::format("post-processor {} is not supported", type));
    const auto single = part.at("single").items();
    if (single.empty() || single[0].at("SpecialToken").is_null()) continue;
    const std::string token = single[0].at("SpecialToken").at("id").text();
    data.special.bos = find_token(data, token);
    if (data.special.bos < 0) single[0].fail(fmt::format("\"{}\" is not in the vocabulary", token));
    data.special.add_bos = true;
  }
}

// "token", {"content": "token", ...} or null.
int32_t configured_token(const TokenizerData& data, const Node& node) {
  if (node.is_null()) return -1;
  const std::string token = node.json().is_object() ? node.at("content").text() : node.text();
  const int32_t id = find_token(data, token);
  if (id < 0 && !data.tokens.empty()) node.fail(fmt::format("\"{}\" is not in the vocabulary", token));
  return id;
}

}  // namespace

TokenizerData parse_tokenizer_json(std::string_view text, const std::string& where) {
  const Json json = parse_json(text, where);
  const Node root(json, where + ":");
  TokenizerData data;
  data.where = where;
  const Node model = root.at("model");
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
    model.fail("byte_fallback is on: a SentencePiece vocabulary, which is read from tokenizer.model instead");
  }
  read_pre_tokenizer(root, data);
  read_normalizer(root, data);
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

void apply_tokenizer_config(TokenizerData& data, std::string_view tokenizer_config, const std::string& where) {
  const Json json = parse_json(tokenizer_config, where);
  const Node root(json, where + ":");
  if (const int32_t bos = configured_token(data, root.at("bos_token")); bos >= 0) data.special.bos = bos;
  if (const int32_t eos = configured_token(data, root.at("eos_token")); eos >= 0) data.special.eos = eos;
  data.special.add_bos = root.at("add_bos_token").boolean_or(data.special.add_bos);
  const Node chat = root.at("chat_template");
  if (chat.json().is_string()) {
    data.chat_template = chat.text();
  } else if (!chat.is_null()) {
    // Several templates by name: the one that a chat without tools uses.
    for (const Node& named : chat.items()) {
      if (named.at("name").text() == "default") data.chat_template = named.at("template").text();
    }
  }
}

void apply_generation_config(TokenizerData& data, std::string_view generation_config, const std::string& where) {
  const Json json = parse_json(generation_config, where);
  const Node root(json, where + ":");
  const int64_t last = data.tokens.empty() ? kMaxTokens : static_cast<int64_t>(data.tokens.size()) - 1;
  const Node eos = root.at("eos_token_id");
  const auto take = [&](const Node& id) {
    const int32_t value = static_cast<int32_t>(id.integer(0, last));
    if (data.special.eos < 0) data.special.eos = value;
    data.special.stop.push_back(value);
  };
  if (eos.json().is_array()) {
    for (const Node& id : eos.items()) take(id);
  } else if (!eos.is_null()) {
    take(eos);
  }
  const Node bos = root.at("bos_token_id");
  if (data.special.bos < 0 && !bos.is_null()) data.special.bos = static_cast<int32_t>(bos.integer(0, last));
}

}  // namespace vqkv
