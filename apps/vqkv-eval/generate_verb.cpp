// Text generated with the exact cache and with each codec from the same prompt, side by side, with the first
// divergence.
#include <fmt/format.h>

#include <algorithm>
#include <cstdio>

#include "attention/sequence.h"
#include "common/tool.h"
#include "core/clock.h"
#include "core/log.h"
#include "core/thread_pool.h"
#include "core/version.h"
#include "experiment/protocol.h"
#include "generation/generate.h"
#include "io/atomic_file.h"
#include "model/chat_template.h"
#include "verbs.h"

namespace vqkv::eval {
namespace {

struct Continuation {
  LoadedCodec codec;
  Generated generated;
  std::string path;
  ByteLedger bytes;
  std::optional<int64_t> claimed_bytes;  // by a codec in another program
  int64_t length = 0;                    // tokens held at the end
  double coded_share = 0;                // of the attention mass
  double encode_seconds = 0, attend_seconds = 0;
  int64_t divergence = -1;  // index of the first new token that differs from the exact cache's; -1: none
};

// One token as it prints; a padded row of the model's vocabulary has no text.
std::string shown(const Tokenizer& tokenizer, int32_t id) {
  return tokenizer.padded(id) ? fmt::format("<{}>", id) : printable(tokenizer.piece(id));
}

Json token_json(const Tokenizer& tokenizer, const Generated& g, int64_t at) {
  const auto ids = g.with_stop();
  if (at < 0 || at >= static_cast<int64_t>(ids.size())) return nullptr;
  const int32_t id = ids[static_cast<size_t>(at)];
  return {{"id", id}, {"text", shown(tokenizer, id)}};
}

// Lines of at most `width` characters, broken at spaces where there are any. A character is a code point: close enough.
std::vector<std::string> wrapped(const std::string& text, size_t width) {
  std::vector<std::string> out{""};
  size_t used = 0, space = std::string::npos;  // characters in the last line; byte of its last space
  for (size_t at = 0; at < text.size();) {
    size_t bytes = 1;
    while (at + bytes < text.size() && (text[at + bytes] & 0xC0) == 0x80) ++bytes;
    const char c = text[at];
    if (c == '\n') {
      out.emplace_back();
      used = 0;
      space = std::string::npos;
    } else if (c != '\r') {
      if (used == width) {
        std::string rest;
        if (space != std::string::npos) {
          rest = out.back().substr(space + 1);
          out.back().resize(space);
        }
        used = static_cast<size_t>(std::count_if(rest.begin(), rest.end(), [](char x) { return (x & 0xC0) != 0x80; }));
        out.push_back(std::move(rest));
        space = std::string::npos;
      }
      if (c == ' ') space = out.back().size();
      out.back() += c == '\t' ? std::string(" ") : text.substr(at, bytes);
      ++used;
    }
    at += bytes;
  }
  return out;
}

std::string side_by_side(const std::string& left_title, const std::string& left, const std::string& right_title,
                         const std::string& right) {
  constexpr size_t kWidth = 56;
  const auto a = wrapped(left, kWidth), b = wrapped(right, kWidth);
  std::string out;
  const auto line = [&](const std::string& x, const std::string& y) {
    const size_t used =
        static_cast<size_t>(std::count_if(x.begin(), x.end(), [](char c) { return (c & 0xC0) != 0x80; }));
    out += x + std::string(kWidth - std::min(used, kWidth), ' ') + " | " + y + "\n";
  };
  line(left_title, right_title);
  out += std::string(kWidth, '-') + "-+-" + std::string(kWidth, '-') + "\n";
  for (size_t i = 0; i < std::max(a.size(), b.size()); ++i) line(i < a.size() ? a[i] : "", i < b.size() ? b[i] : "");
  return out;
}

// The text with a mark where it leaves the other one.
std::string marked(const Tokenizer& tokenizer, const Generated& g, int64_t divergence) {
  if (divergence < 0 || divergence >= static_cast<int64_t>(g.tokens.size()))
    return printable(tokenizer.decode(g.tokens, true));
  const auto cut = g.tokens.begin() + divergence;
  std::string before, after;
  for (auto t = g.tokens.begin(); t != g.tokens.end(); ++t)
    (t < cut ? before : after) += tokenizer.padded(*t) ? "" : tokenizer.piece(*t);
  return printable(before) + "»" + printable(after);
}

}  // namespace

int run_generate(const GenerateVerb& v) {
  if (v.prompt.empty() && v.prompt_file.empty())
    fail_usage("no prompt was given; use --prompt TEXT or --prompt-file FILE");
  const GenerateOptions options{
      .new_tokens = v.new_tokens,
      .stop = {},
      .sampling = {.temperature = v.temperature, .top_k = v.top_k, .top_p = v.top_p, .seed = v.seed},
      .exact_prefill = v.exact_prefill};
  Sampler(options.sampling);  // what is out of range is told before the model is read
  const std::string text = v.prompt_file.empty() ? v.prompt : read_file(v.prompt_file, int64_t{64} << 20);
  if (printable(text) != text)
    fail_data(fmt::format("{}: not UTF-8", v.prompt_file.empty() ? "--prompt" : v.prompt_file));
  const auto model = open_model(v.common);
  const Tokenizer& tokenizer = model->tokenizer();
  const ModelFacts& facts = model->facts();

  std::vector<int32_t> prompt;
  if (v.chat) {
    prompt =
        encode_chat(tokenizer, {{"user", text}}, v.thinking ? ChatPrompt::kAnswer : ChatPrompt::kAnswerWithoutThinking);
  } else {
    prompt = with_bos(tokenizer.encode(text, v.special), tokenizer.special());
  }
  if (prompt.empty()) fail_data("the prompt holds no token");

  Programs programs;
  std::vector<Continuation> runs(1);
  runs[0].codec = load_codec("exact", v.common, facts);
  for (auto& codec : load_codecs(v.common, facts)) {
    programs.add(codec.exec);
    runs.emplace_back();
    runs.back().codec = std::move(codec);
  }
  if (interrupted()) return kExitOk;
  // The exact rows of all caches have one type, so that only the codes differ.
  if (runs.size() > 1) runs[0].codec.policy = CachePolicy::exact(runs[1].codec.policy.exact_dtype);

  for (const Continuation& run : runs)
    require_cache_memory(std::vector<HeldCaches>{{run.codec.label, *run.codec.codecs, run.codec.policy}},
                         static_cast<int64_t>(prompt.size()) + v.new_tokens);

  Progress progress("generate: token", v.new_tokens * static_cast<int64_t>(runs.size()));
  int64_t drawn = 0;
  for (size_t r = 0; r < runs.size(); ++r) {
    Continuation& run = runs[r];
    Sequence sequence(run.codec.codecs, run.codec.policy, v.common.attention);
    GenerateOptions mine = options;
    if (!v.ignore_stop) mine.stop = tokenizer.special().stop;
    run.generated = generate(*model, sequence.session(), prompt, mine, [&](int32_t) {
      progress.update(++drawn, run.codec.label);
      return !interrupted();
    });
    if (interrupted()) {
      runs.resize(r);  // an unfinished text can't be compared
      break;
    }
    run.path = sequence.path();
    sequence.check_ledger(run.codec.label);
    run.bytes = sequence.bytes();
    if (run.codec.exec) run.claimed_bytes = run.codec.exec->claimed_bytes();
    run.length = sequence.cache().length();
    run.coded_share = sequence.coded_share();
    run.encode_seconds = sequence.cache().encode_seconds();
    run.attend_seconds = sequence.session().attend_seconds();
    run.divergence = first_divergence(runs[0].generated, run.generated);
  }
  if (runs.empty()) return kExitOk;

  const CacheShape shape = facts.cache_shape();
  Table table{{{"codec", "codec", "", false},
               {"protocol", "protocol", "", false},
               {"path", "path", "", false},
               {"new_tokens", "tokens", "{:.0f}"},
               {"stopped", "ended by", "", false},
               {"divergence", "first divergence", "{:.0f}"},
               {"exact_token", "exact token", "", false},
               {"codec_token", "codec token", "", false},
               {"coded_mass", "coded mass", "{:.3f}"},
               {"bits_per_value", "bits/value", "{:.3f}"},
               {"prefill", "prefill tok/s", "{:.1f}"},
               {"decode", "decode tok/s", "{:.2f}"}},
              {}};
  for (const Continuation& run : runs) {
    const Generated& g = run.generated;
    Json row = {{"codec", run.codec.label},
                {"protocol", (v.exact_prefill && run.codec.policy.codes ? "exact prompt, then " : "") +
                                 protocol_text(run.codec.policy, run.codec.codecs->config())},
                {"path", run.path},
                {"new_tokens", g.tokens.size()},
                {"coded_mass", run.coded_share},
                {"tokens", g.tokens},
                {"text", printable(tokenizer.decode(g.tokens, true))},
                {"bytes", run.bytes.to_json()},
                {"cache", run.codec.cache},
                {"prefill", static_cast<double>(prompt.size()) / g.prefill_seconds},
                {"seconds",
                 {{"prefill", g.prefill_seconds},
                  {"decode", g.decode_seconds},
                  {"encode", run.encode_seconds},
                  {"attend", run.attend_seconds}}}};
    add_bits(row, run.bytes, shape, run.length, run.codec.codecs->config(), run.claimed_bytes);
    row["decode"] = g.decode_steps > 0 ? Json(static_cast<double>(g.decode_steps) / g.decode_seconds) : Json();
    row["stopped"] = g.stop_token >= 0 ? shown(tokenizer, g.stop_token) : "length";
    const auto padded =
        std::count_if(g.tokens.begin(), g.tokens.end(), [&](int32_t id) { return tokenizer.padded(id); });
    row["padded_tokens"] = padded;
    if (padded > 0)
      log_warning(
          fmt::format("{}: {} of {} new tokens are beyond the tokenizer's {} entries (the model has {} rows): "
                      "they print as nothing, their ids stand in --json",
                      run.codec.label, padded, g.tokens.size(), tokenizer.size(), facts.vocab));
    row["first_divergence"] = nullptr;
    if (run.divergence >= 0) {
      const Json a = token_json(tokenizer, runs[0].generated, run.divergence),
                 b = token_json(tokenizer, g, run.divergence);
      row["first_divergence"] = {{"index", run.divergence}, {"exact", a}, {"codec", b}};
      row["divergence"] = run.divergence;
      row["exact_token"] = a.is_null() ? "" : a["text"].dump();
      row["codec_token"] = b.is_null() ? "" : b["text"].dump();
    }
    table.rows.push_back(std::move(row));
  }
  const Json full = {
      {"facts",
       {{"model", facts.name},
        {"model_hash", facts.hash},
        {"weights", model->weights()},
        {"threads", thread_count()},
        {"prompt_tokens", prompt.size()},
        {"chat", v.chat},
        {"thinking", v.thinking},
        {"exact_prefill", v.exact_prefill},
        {"sampling", {{"temperature", v.temperature}, {"top_k", v.top_k}, {"top_p", v.top_p}, {"seed", v.seed}}},
        {"bos", tokenizer.special().add_bos},
        {"command", v.common.command},
        {"time", utc_now()},
        {"tool", version_facts()}}},
      {"prompt", prompt},
      {"rows", table.rows}};
  if (!print(table, v.common.format, full)) return kExitOk;
  std::string out;
  if (runs.size() == 1) out = "\n" + printable(tokenizer.decode(runs[0].generated.tokens, true)) + "\n";
  for (size_t r = 1; r < runs.size(); ++r) {
    const int64_t at = runs[r].divergence;
    out += "\n" + side_by_side("exact", marked(tokenizer, runs[0].generated, at), runs[r].codec.label,
                               marked(tokenizer, runs[r].generated, at));
    out += at < 0 ? "Equal, token for token.\n"
                  : fmt::format("» marks the first divergence, new token {} (counted from 0).\n", at);
  }
  std::fputs(out.c_str(), stdout);
  return kExitOk;
}

}  // namespace vqkv::eval
