#include "continuation.h"

#include <fmt/format.h>

#include <algorithm>

#include "attention/sequence.h"
#include "common/tool.h"
#include "config/config.h"
#include "core/clock.h"
#include "core/log.h"
#include "core/thread_pool.h"
#include "core/version.h"
#include "experiment/protocol.h"
#include "io/atomic_file.h"
#include "model/chat_template.h"

namespace vqkv::eval {
namespace {

std::string prompt_text(const GenerateVerb& v) {
  if (v.prompt.empty() && v.prompt_file.empty())
    fail_usage("no prompt was given; use --prompt TEXT or --prompt-file FILE");
  std::string text = v.prompt_file.empty() ? v.prompt : read_file(v.prompt_file, int64_t{64} << 20);
  if (printable(text) != text)
    fail_data(fmt::format("{}: not UTF-8", v.prompt_file.empty() ? "--prompt" : v.prompt_file));
  return text;
}

std::vector<int32_t> prompt_tokens(const GenerateVerb& v, const std::string& text, const Tokenizer& tokenizer) {
  std::vector<int32_t> prompt;
  if (v.chat) {
    prompt =
        encode_chat(tokenizer, {{"user", text}}, v.thinking ? ChatPrompt::kAnswer : ChatPrompt::kAnswerWithoutThinking);
  } else {
    prompt = with_bos(tokenizer.encode(text, v.special), tokenizer.special());
  }
  if (prompt.empty()) fail_data("the prompt holds no token");
  return prompt;
}

// Takes strategy.* out of the overrides.
Json strategy_knobs(const StrategyKind& kind, std::vector<std::string>& overrides) {
  Config config;
  config.tree["strategy"] = Json::object();
  std::erase_if(overrides, [&](const std::string& o) {
    if (!o.starts_with("strategy.")) return false;
    if (kind.knobs().empty())
      fail_usage(fmt::format("'{}': strategy '{}' has no knobs; name the one that it is of with --strategy", o,
                             kind.describe().name));
    apply_override(config, o);
    return true;
  });
  return annotated(config, [&] { return kind.canonical(config.tree["strategy"], "strategy"); });
}

}  // namespace

Continued continue_prompt(const GenerateVerb& v) {
  const GenerateOptions options{
      .new_tokens = v.new_tokens,
      .stop = {},
      .sampling = {.temperature = v.temperature, .top_k = v.top_k, .top_p = v.top_p, .seed = v.seed},
      .exact_prefill = v.exact_prefill};
  Sampler(options.sampling);  // what is out of range is told before the model is read
  const StrategyKind& kind = find_strategy(v.strategy, "--strategy");
  if (v.strategy != "plain") refuse_exec(v.common, kCodesOfItsOwn);
  if (v.strategy != "plain" && !v.common.device.on_cpu())
    fail_unavailable("--strategy " + v.strategy + ": caches on a device take no token back; --device cpu runs it");
  CommonOptions common = v.common;
  Continued out;
  out.knobs = strategy_knobs(kind, common.overrides);
  const std::unique_ptr<Strategy> plain = find_strategy("plain").make(Json::object()), guessing = kind.make(out.knobs);
  const std::string text = prompt_text(v);
  out.model = open_model(common);
  const Tokenizer& tokenizer = out.model->tokenizer();
  const ModelFacts& facts = out.model->facts();
  out.prompt = prompt_tokens(v, text, tokenizer);
  facts.require_context(static_cast<int64_t>(out.prompt.size()) + v.new_tokens);  // before a codec is trained

  std::vector<Continuation>& runs = out.runs;
  Programs programs;
  runs.resize(1);
  runs[0].codec = load_codec("exact", common, facts);
  for (auto& codec : load_codecs(common, facts)) {
    programs.add(codec.exec);
    Continuation run;
    run.codec = std::move(codec);
    run.target = runs.size();
    runs.push_back(run);
    if (v.strategy == "plain") continue;
    run.strategy = v.strategy;
    run.target = kind.describe().target == "exact" ? 0 : run.target;
    runs.push_back(std::move(run));
  }
  if (interrupted()) {
    runs.clear();
    return out;
  }
  // The exact rows of all caches have one type, so that only the codes differ.
  if (runs.size() > 1) {
    runs[0].codec.policy = CachePolicy::exact(runs[1].codec.policy.exact_dtype);
    std::vector<LoadedCodec> coded;
    for (size_t r = 1; r < runs.size(); ++r)
      if (!runs[r].guesses()) coded.push_back(runs[r].codec);
    warn_of_exact_rows(coded);
  }

  for (const Continuation& run : runs) require_device_form(common, run.label(), run.codec.codecs, run.codec.policy);

  std::vector<std::shared_ptr<const CacheModel>> models;
  const int64_t tokens = static_cast<int64_t>(out.prompt.size()) + v.new_tokens;
  for (const Continuation& run : runs) {
    const Strategy& strategy = run.guesses() ? *guessing : *plain;
    const int64_t beside = strategy.bytes_beside(facts.cache_shape(), run.codec.policy, tokens);
    require_cache_memory(std::vector<HeldCaches>{{run.label(), *run.codec.codecs, run.codec.policy, 1, beside}},
                         tokens);
    models.push_back(strategy.cache_model(run.codec.codecs, run.codec.policy));
  }

  Progress progress(v.strategy == "plain" ? "generate: token" : "strategy: token",
                    v.new_tokens * static_cast<int64_t>(runs.size()));
  int64_t drawn = 0;
  for (size_t r = 0; r < runs.size(); ++r) {
    Continuation& run = runs[r];
    Sequence sequence(models[r], run.codec.policy, common.attention);
    GenerateOptions mine = options;
    if (!v.ignore_stop) mine.stop = tokenizer.special().stop;
    run.generated = (run.guesses() ? *guessing : *plain)
                        .generate(
                            *out.model, sequence, out.prompt, mine,
                            [&](int32_t) {
                              progress.update(++drawn, run.label());
                              return !interrupted();
                            },
                            run.counts);
    if (interrupted()) {
      runs.resize(r);  // an unfinished text can't be compared
      break;
    }
    run.path = sequence.path();
    sequence.check_ledger(run.label());
    run.bytes = sequence.bytes();
    if (run.codec.exec) run.claimed_bytes = run.codec.exec->claimed_bytes();
    run.length = sequence.cache().length();
    run.device_bytes = sequence.session().device_bytes();
    if (common.device.on_cpu()) run.coded_share = sequence.coded_share();
    run.encode_seconds = sequence.cache().encode_seconds();
    if (common.device.on_cpu()) run.attend_seconds = sequence.session().attend_seconds();
    run.divergence = first_divergence(runs[0].generated, run.generated);
    run.target_divergence = first_divergence(runs[run.target].generated, run.generated);
  }
  return out;
}

std::string shown(const Tokenizer& tokenizer, int32_t id) {
  return tokenizer.padded(id) ? fmt::format("<{}>", id) : printable(tokenizer.piece(id));
}

Json facts_of(const GenerateVerb& v, const Continued& all) {
  const ModelFacts& facts = all.model->facts();
  return {{"model", facts.name},
          {"model_hash", facts.hash},
          {"weights", all.model->weights()},
          {"device", v.common.device.require()},
          {"threads", thread_count()},
          {"prompt_tokens", all.prompt.size()},
          {"chat", v.chat},
          {"thinking", v.thinking},
          {"exact_prefill", v.exact_prefill},
          {"sampling", {{"temperature", v.temperature}, {"top_k", v.top_k}, {"top_p", v.top_p}, {"seed", v.seed}}},
          {"bos", all.model->tokenizer().special().add_bos},
          {"command", v.common.command},
          {"time", utc_now()},
          {"tool", version_facts()}};
}

Json row_of(const GenerateVerb& v, const Continued& all, const Continuation& run) {
  const Generated& g = run.generated;
  Json row = {{"codec", run.codec.label},
              {"strategy", run.strategy},
              {"protocol", (v.exact_prefill && run.codec.policy.codes ? "exact prompt, then " : "") +
                               protocol_text(run.codec.policy, run.codec.codecs->config())},
              {"path", run.path},
              {"new_tokens", g.tokens.size()},
              {"coded_mass", run.coded_share ? Json(*run.coded_share) : Json()},
              {"tokens", g.tokens},
              {"text", printable(all.model->tokenizer().decode(g.tokens, true))},
              {"bytes", run.bytes.to_json()},
              {"config", run.codec.codecs->config()},
              {"cache", run.codec.cache},
              {"prefill", static_cast<double>(all.prompt.size()) / g.prefill_seconds},
              {"counts", run.counts.to_json()},
              {"seconds",
               {{"prefill", g.prefill_seconds},
                {"decode", g.decode_seconds},
                {"encode", run.encode_seconds},
                {"attend", run.attend_seconds ? Json(*run.attend_seconds) : Json()}}}};
  add_bits(row, run.bytes, all.model->facts().cache_shape(), run.length, run.codec.codecs->config(), run.claimed_bytes);
  if (!v.common.device.on_cpu()) row["device_bytes"] = run.device_bytes;
  if (run.guesses()) row["knobs"] = all.knobs;
  row["stopped"] = g.stop_token >= 0 ? shown(all.model->tokenizer(), g.stop_token) : "length";
  // The first token is the prompt's.
  const auto drawn = static_cast<double>(g.with_stop().size()) - 1;
  const StrategyCounts& c = run.counts;
  row["decode"] = drawn > 0 && g.decode_seconds > 0 && g.decode_steps > 0 ? Json(drawn / g.decode_seconds) : Json();
  if (c.drafted > 0) row["acceptance"] = static_cast<double>(c.accepted) / static_cast<double>(c.drafted);
  if (c.target.passes > 0 && drawn > 0) {
    row["tokens_a_pass"] = drawn / static_cast<double>(c.target.passes);
    const auto each = [&](int64_t target, int64_t draft) { return static_cast<double>(target + draft) / drawn; };
    row["weight_bytes"] = each(c.target.weights, c.draft.weights);
    row["code_bytes"] = each(c.target.codes, c.draft.codes);
    row["exact_bytes"] = each(c.target.exact, c.draft.exact);
    row["moved_bytes"] = each(c.moved, 0);
  }
  if (run.guesses()) {
    const Continuation& target = all.runs[run.target];
    row["target"] = target.codec.label;
    row["target_divergence"] = run.target_divergence < 0 ? Json() : Json(run.target_divergence);
    row["same_text"] =
        run.target_divergence < 0 ? std::string("yes") : fmt::format("until token {}", run.target_divergence);
  }
  return row;
}

std::vector<Column> strategy_columns() {
  return {{"acceptance", "acceptance", "{:.3f}"},
          {"tokens_a_pass", "tokens/pass", "{:.2f}"},
          {"weight_bytes", "weights B/token", "{:.0f}"},
          {"code_bytes", "codes B/token", "{:.0f}"},
          {"exact_bytes", "exact B/token", "{:.0f}"},
          {"moved_bytes", "moved B/token", "{:.0f}"},
          {"target", "target", "", false},
          {"same_text", "its text", "", false}};
}

}  // namespace vqkv::eval
