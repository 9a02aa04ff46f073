// model and tokens: facts of a model and of a text, as every tool sees them.
#include <fmt/format.h>

#include "common/tool.h"
#include "core/error.h"
#include "model/chat_template.h"
#include "model/runtime.h"
#include "model/text_input.h"
#include "verbs.h"

namespace vqkv::dump {

std::string rope_text(const RopeFacts& r) {
  std::string text =
      fmt::format("theta {}, {} of {} channels rotate, scaling {}", r.theta, r.rotary_dim, r.head_dim, r.scaling);
  if (r.attention_factor != 1)  // scores of rotated channels grow by its square
    text += fmt::format(", queries and keys times {:.6g} (attention factor)", r.attention_factor);
  return text;
}

int run_model(const std::string& model, TableFormat format) {
  const ModelFacts f = read_model_facts(model);
  Json facts = f.to_json();
  facts["group"] = f.q_heads / f.kv_heads;
  for (const DType t : {DType::kF32, DType::kF16, DType::kBF16})
    facts[fmt::format("kv_bytes_per_token_{}", dtype_name(t))] = f.kv_bytes_per_token(t);
  // Values a token: what "bits per value" divides by.
  facts["kv_values_per_token"] = int64_t{2} * f.layers * f.kv_heads * f.head_dim;
  try {
    const auto tokenizer = load_tokenizer(model);
    const SpecialTokens& s = tokenizer->special();
    const std::string& chat = tokenizer->chat_template();
    const std::string_view chat_name = chat_template_name(chat);
    facts["tokenizer"] = {{"kind", tokenizer->kind()},
                          {"size", tokenizer->size()},
                          {"bos", s.bos},
                          {"eos", s.eos},
                          {"add_bos", s.add_bos},
                          {"stop", s.stop},
                          {"chat_template", chat.empty()        ? "none"
                                            : chat_name.empty() ? "unknown"
                                                                : chat_name}};
  } catch (const Error& e) {
    if (e.kind() != ErrorKind::kBadData) throw;
    facts["tokenizer"] = {{"error", e.what()}};  // a model without one still has facts; texts then need --token-ids
  }
  Table table;
  if (format == TableFormat::kJson || format == TableFormat::kJsonl) {
    table.rows.push_back(facts);
    print(table, format);
    return kExitOk;
  }
  table.columns = {{"fact", "fact", "", false}, {"value", "value", "", false}};
  const auto say = [&](const std::string& fact, const Json& value) {
    table.rows.push_back({{"fact", fact}, {"value", value}});
  };
  say("model", f.name);
  say("architecture", f.architecture);
  say("source", f.source);
  say("hash", f.hash);
  say("parameters", f.parameters);
  say("layers", f.layers);
  say("hidden, FFN, vocabulary", fmt::format("{}, {}, {}", f.hidden, f.ffn, f.vocab));
  say("heads", fmt::format("{} query, {} KV (group of {}), {} channels each", f.q_heads, f.kv_heads,
                           f.q_heads / f.kv_heads, f.head_dim));
  say("context length", f.context_length);
  if (f.sliding_window > 0) say("sliding window", fmt::format("{}; longer contexts are refused", f.sliding_window));
  say("RoPE", fmt::format("{}; pair p is channels (p, p + {})", rope_text(f.rope), f.rope.rotary_dim / 2));
  say("QKV bias, output bias, q/k norm, tied head",
      fmt::format("{}, {}, {}, {}", f.qkv_bias ? "yes" : "no", f.o_bias ? "yes" : "no", f.qk_norm ? "yes" : "no",
                  f.tied_head ? "yes" : "no"));
  say("cache of a token", fmt::format("{} values, {} in 16 bits", facts["kv_values_per_token"].get<int64_t>(),
                                      human_bytes(static_cast<double>(f.kv_bytes_per_token(DType::kF16)))));
  for (const int64_t context : {int64_t{4096}, int64_t{32768}, int64_t{131072}})
    say(fmt::format("cache of {} tokens", context),
        fmt::format("{} in 16 bits{}", human_bytes(static_cast<double>(f.kv_bytes_per_token(DType::kF16) * context)),
                    context > f.longest_context() ? " (beyond the model's context)" : ""));
  if (facts["tokenizer"].contains("error")) {
    say("tokenizer", facts["tokenizer"]["error"]);
  } else {
    say("tokenizer",
        fmt::format("{}, {} entries, BOS {}, chat template {}", facts["tokenizer"]["kind"].get<std::string>(),
                    facts["tokenizer"]["size"].get<int64_t>(),
                    facts["tokenizer"]["add_bos"].get<bool>() ? "added by the model" : "not added",
                    facts["tokenizer"]["chat_template"].get<std::string>()));
  }
  print(table, format);
  return kExitOk;
}

int run_tokens(const TokensVerb& v) {
  std::unique_ptr<Tokenizer> loaded;
  const Tokenizer* tokenizer =
      tokenizer_for(v.text, [&]() -> const Tokenizer& { return *(loaded = load_tokenizer(v.model)); });
  const auto documents =
      read_documents(v.text, tokenizer, v.text.token_ids.empty() ? 0 : read_model_facts(v.model).vocab);
  if (v.ids) {
    for (const TextDocument& d : documents) {
      std::string line;
      for (const int32_t id : d.tokens) line += (line.empty() ? "" : " ") + std::to_string(id);
      std::puts(line.c_str());
    }
    return kExitOk;
  }
  if (v.format == TableFormat::kJson || v.format == TableFormat::kJsonl) {
    Table table;
    for (const TextDocument& d : documents)
      table.rows.push_back(
          {{"document", d.name},
           {"tokens", d.tokens.size()},
           {"bos", tokenizer && tokenizer->special().add_bos ? Json(tokenizer->special().bos) : Json()},
           {"ids", d.tokens}});
    print(table, v.format);
    return kExitOk;
  }
  Table table;
  table.columns = {{"document", "document", "", false}, {"index", ""}, {"id", ""}, {"piece", "piece", "", false}};
  for (const TextDocument& d : documents)
    for (size_t i = 0; i < d.tokens.size(); ++i) {
      // As JSON text, so that spaces, line ends and broken UTF-8 are visible.
      const bool text = tokenizer && !tokenizer->padded(d.tokens[i]);
      const std::string piece =
          text ? Json(tokenizer->piece(d.tokens[i])).dump(-1, ' ', false, Json::error_handler_t::replace) : "";
      table.rows.push_back({{"document", d.name}, {"index", i}, {"id", d.tokens[i]}, {"piece", piece}});
    }
  print(table, v.format);
  return kExitOk;
}

}  // namespace vqkv::dump
