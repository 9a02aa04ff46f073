// What the files of a Hugging Face folder say beside the vocabulary. The tokenizer's own files go before the model's:
// LLaMA's first conversions name ids of another vocabulary in config.json. Judged by transformers
// (tests/golden/test_token_folders.cpp).
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <optional>
#include <set>

#include "core/error.h"
#include "core/json.h"
#include "core/log.h"
#include "model/json_node.h"
#include "model/tokenizer_data.h"

namespace vqkv {
namespace {

// A JSON file of the folder; an empty object where there is none.
struct File {
  Json json = Json::object();
  JsonNode root;
  File(const SideFiles& files, const std::string& text, const char* name)
      : json(text.empty() ? Json::object() : parse_json(text, files.folder + "/" + name)),
        root(json, fmt::format("{}/{}:", files.folder, name)) {}
  File(const File&) = delete;
  File& operator=(const File&) = delete;
};

// "token" or {"content": "token", ...}; "" for none.
std::string token_text(const JsonNode& node) {
  if (node.is_null()) return "";
  return node.json().is_object() ? node.at("content").text() : node.text();
}

// Texts of the tokens that a configuration calls special.
void collect_special(const JsonNode& root, std::set<std::string>& out) {
  for (const char* key : {"bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"})
    out.insert(token_text(root.at(key)));
  for (const char* key : {"additional_special_tokens", "extra_special_tokens"}) {
    const JsonNode list = root.at(key);
    if (list.json().is_array())
      for (const JsonNode& token : list.items()) out.insert(token_text(token));
  }
}

// Tokens that the files name with an id.
std::vector<AddedToken> named_tokens(const File& added_tokens, const File& config,
                                     const std::set<std::string>& special) {
  std::vector<AddedToken> out;
  const Json& legacy = added_tokens.json;
  if (!legacy.is_object()) added_tokens.root.fail("wanted an object of token and id");
  for (const auto& [token, id] : legacy.items()) {
    const JsonNode entry(id, fmt::format("{} \"{}\"", added_tokens.root.path(), token));
    const bool is_special = special.contains(token);
    out.push_back({token, entry.integer(0, kMaxTokens), is_special, !is_special, entry.path()});
  }
  const JsonNode decoder = config.root.at("added_tokens_decoder");
  if (decoder.is_null()) return out;
  if (!decoder.json().is_object()) decoder.fail("wanted an object of id and token");
  for (const auto& [key, token] : decoder.json().items()) {
    const JsonNode entry(token, fmt::format("{} \"{}\"", decoder.path(), key));
    int64_t id = -1;
    const auto r = std::from_chars(key.data(), key.data() + key.size(), id);
    if (r.ec != std::errc() || r.ptr != key.data() + key.size() || id < 0 || id > kMaxTokens)
      entry.fail("the key is no token id");
    out.push_back(read_added_token(entry, id));
  }
  return out;
}

// Sets `id` where the file has the key at all; null and "" say that there is none.
bool read_named(const TokenizerData& data, const JsonNode& root, const char* key, int32_t& id) {
  if (!root.json().contains(key)) return false;
  const std::string token = token_text(root.at(key));
  if (token.empty() && !root.at(key).is_null()) return false;  // LLaMA's first conversions: not filled in
  id = token.empty() ? -1 : find_token(data, token);
  if (id < 0 && !token.empty()) root.at(key).fail(fmt::format("\"{}\" is not in the vocabulary", token));
  return true;
}

bool is_llama_class(const std::string& name) {
  constexpr std::array<std::string_view, 3> kNames{"LlamaTokenizer", "CodeLlamaTokenizer", "LLaMATokenizer"};
  const std::string_view base =
      std::string_view(name).substr(0, name.ends_with("Fast") ? name.size() - 4 : name.size());
  return std::find(kNames.begin(), kNames.end(), base) != kNames.end();
}

// The classes of Llama ask add_bos_token, all others the template of tokenizer.json. transformers 4 does so; 5 asks the
// template of a Llama folder too, so where the two disagree we say which one holds. Without a tokenizer.json there is
// the flag alone, which is documented as on.
void decide_bos(TokenizerData& data, const JsonNode& config, const std::string& tokenizer_class, int32_t template_bos) {
  const std::optional<bool> flag = config.at("add_bos_token").boolean();
  const bool from_template = data.from_json && !(flag && is_llama_class(tokenizer_class));
  if (flag && data.from_json && *flag != (template_bos >= 0))
    log_warning(fmt::format("{} add_bos_token is {}, but the template of tokenizer.json puts {} in front; {} holds",
                            config.path(), *flag, template_bos >= 0 ? "BOS" : "no token",
                            from_template ? "the template" : "add_bos_token"));
  if (from_template) {
    data.special.add_bos = template_bos >= 0;
    if (template_bos >= 0) data.special.bos = template_bos;
    return;
  }
  data.special.add_bos = flag.value_or(data.special.bos >= 0);
  if (data.special.add_bos && data.special.bos < 0) config.fail("add_bos_token is true, but no file names a BOS token");
}

// transformers 5: a Llama class brings its own prefix rule, whatever tokenizer.json says; Mistral's folders name that
// class and get the general one.
void decide_prefix(TokenizerData& data, const JsonNode& config, const std::string& tokenizer_class,
                   const std::string& model_type) {
  const std::optional<bool> legacy = config.at("legacy").boolean();
  using Where = PrefixSpace::Where;
  if (is_llama_class(tokenizer_class) && model_type != "mistral") {
    const Where where = legacy.value_or(false) ? Where::kEvery : Where::kFirst;
    data.prefix = {config.at("add_prefix_space").boolean_or(true) ? where : Where::kNever, false, false};
  } else if (data.pre.empty() && !legacy.value_or(true)) {
    data.prefix = {Where::kFirst, false, false};
  }
}

void apply_ids(TokenizerData& data, const File& file, bool names_bos, bool names_eos) {
  const auto take = [&](const JsonNode& node) {
    const auto size = static_cast<int64_t>(data.tokens.size());
    const int64_t id = node.integer(0, kMaxTokens);
    if (id >= size)
      node.fail(
          fmt::format("is {}, but the tokenizer has {} tokens, those of added_tokens.json and "
                      "added_tokens_decoder included",
                      id, size));
    return static_cast<int32_t>(id);
  };
  SpecialTokens& special = data.special;
  const JsonNode bos = file.root.at("bos_token_id");
  if (!names_bos && special.bos < 0 && !bos.is_null()) special.bos = take(bos);
  const JsonNode eos = file.root.at("eos_token_id");
  if (eos.is_null()) return;
  const auto ids = eos.json().is_array() ? eos.items() : std::vector<JsonNode>{eos};
  for (const JsonNode& node : ids) {
    const int32_t id = take(node);
    if (!names_eos && special.eos < 0) special.eos = id;
    if (id == special.bos && id != special.eos)
      log_warning(fmt::format("{} is {}, the tokenizer's BOS token; it does not end a text", node.path(), id));
    else
      special.stop.push_back(id);
  }
}

void read_chat_template(TokenizerData& data, const JsonNode& chat) {
  if (chat.json().is_string()) {
    data.chat_template = chat.text();
  } else if (!chat.is_null()) {
    // Several templates by name: the one that a chat without tools uses.
    for (const JsonNode& named : chat.items())
      if (named.at("name").text() == "default") data.chat_template = named.at("template").text();
  }
}

}  // namespace

void apply_side_files(TokenizerData& data, const SideFiles& files) {
  const File config(files, files.tokenizer_config, "tokenizer_config.json");
  const File special_map(files, files.special_tokens_map, "special_tokens_map.json");
  const File added(files, files.added_tokens, "added_tokens.json");
  const File model(files, files.config, "config.json");
  std::set<std::string> called_special;
  collect_special(config.root, called_special);
  collect_special(special_map.root, called_special);
  add_tokens(data, named_tokens(added, config, called_special));
  for (const std::string& token : called_special) mark_special(data, find_token(data, token));
  if (!data.from_json) mark_special(data, data.unknown);

  std::string tokenizer_class = config.root.at("tokenizer_class").text_or_empty();
  if (tokenizer_class.empty()) tokenizer_class = model.root.at("tokenizer_class").text_or_empty();
  const int32_t template_bos = data.from_json && data.special.add_bos ? data.special.bos : -1;
  SpecialTokens& special = data.special;
  bool names_bos = read_named(data, config.root, "bos_token", special.bos) ||
                   read_named(data, special_map.root, "bos_token", special.bos);
  bool names_eos = read_named(data, config.root, "eos_token", special.eos) ||
                   read_named(data, special_map.root, "eos_token", special.eos);
  if (is_llama_class(tokenizer_class)) {  // what the class itself calls them
    if (!names_bos && special.bos < 0) special.bos = find_token(data, "<s>");
    if (!names_eos && special.eos < 0) special.eos = find_token(data, "</s>");
  }
  decide_bos(data, config.root, tokenizer_class, template_bos);
  decide_prefix(data, config.root, tokenizer_class, model.root.at("model_type").text_or_empty());

  // generation_config.json is written from config.json where nobody wrote it by hand.
  if (files.generation_config.empty())
    apply_ids(data, model, names_bos, names_eos);
  else
    apply_ids(data, File(files, files.generation_config, "generation_config.json"), names_bos, names_eos);
  complete_stop_tokens(data);

  read_chat_template(data, config.root.at("chat_template"));
  // Newer checkpoints keep the template in a file of its own, which goes first.
  if (!files.chat_template.empty()) data.chat_template = files.chat_template;
}

}  // namespace vqkv
