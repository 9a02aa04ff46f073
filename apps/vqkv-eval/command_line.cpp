// vqkv-eval: replays generation with a compressed cache and says what it cost.
#include <cmath>
#include <cstdlib>

#include <fmt/format.h>
#include <CLI/CLI.hpp>

#include "attention/provided.h"
#include "common/flags.h"
#include "common/tools.h"
#include "verbs.h"

using namespace vqkv;
using namespace vqkv::eval;

namespace {

void add_common(CLI::App& verb, CommonOptions& o, OutputFlags& f, bool needs_codec) {
  add_model_flag(verb, o.model);
  auto* codec = verb.add_option("--codec", o.codecs,
                                "exact, a frozen FILE.codec.h5, a cell.yaml that is trained first, or exec:COMMAND, a "
                                "codec in another program (replay and generate; docs/exec.md); repeatable")
                    ->allow_extra_args(false);
  if (needs_codec) codec->required();
  verb.add_option("overrides", o.overrides, "key=value, e.g. cache.window=64; applied to every codec but exact");
  verb.add_option("--attention", o.attention,
                  "attention backend of every row, the exact cache included: reference, cpu-reconstruct, cpu-table, "
                  "cpu-table8 (8-bit tables: logits err by up to 1/8), or auto (each step by the cheapest, so rows may "
                  "take different paths)")
      ->capture_default_str();
  add_weights_flag(verb, o.device);
  f.add_to(verb);
}

void add_exec(CLI::App& verb, CommonOptions& o) {
  verb.add_option("--exec-timeout", o.exec_seconds, "seconds that an answer of exec:COMMAND may take")
      ->capture_default_str()
      ->check(CLI::Range(0.1, 86400.0))
      ->check([](const std::string& text) {  // beyond no limit, and within none
        return std::isnan(std::strtod(text.c_str(), nullptr)) ? "nan is not a number of seconds" : std::string();
      });
}

// Prompt, length, sampling and strategy of `generate` and `strategy`.
void add_prompt(CLI::App& verb, GenerateVerb& v) {
  auto* prompt = verb.add_option("--prompt", v.prompt, "prompt text");
  verb.add_option("--prompt-file", v.prompt_file, "prompt from a UTF-8 file")
      ->check(CLI::ExistingFile)
      ->excludes(prompt);
  auto* chat = verb.add_flag("--chat", v.chat, "wrap the prompt in the model's chat template");
  verb.add_flag("!--no-thinking", v.thinking, "with --chat: Qwen3 answers without a block of thoughts")->needs(chat);
  verb.add_flag("--special", v.special, "special tokens written in the prompt become their ids")->excludes(chat);
  verb.add_flag("--exact-prefill", v.exact_prefill, "the prompt attends to exact K and V and is coded once at its end");
  verb.add_option("--new-tokens", v.new_tokens, "tokens to generate, at most")
      ->capture_default_str()
      ->check(CLI::Range(1, 1 << 24));
  verb.add_flag("--ignore-stop", v.ignore_stop, "go on after a stop token");
  verb.add_option("--temperature", v.temperature, "0: greedy")->capture_default_str();
  verb.add_option("--top-k", v.top_k, "0: off")->capture_default_str();
  verb.add_option("--top-p", v.top_p, "1: off")->capture_default_str();
  verb.add_option("--seed", v.seed, "of the sampler, the same for every cache")->capture_default_str();
  verb.add_option(
          "--strategy", v.strategy,
          "how tokens come about over every codec but exact (`vqkv-eval ls strategies`); its knobs are overrides, "
          "e.g. strategy.gamma=6")
      ->capture_default_str();
}

void add_measured(CLI::App& verb, TablesVerb& v) {
  verb.add_option("--measured", v.measured, "result files of replay and strategy (--json); other verbs' are refused")
      ->check(CLI::ExistingFile);
}

}  // namespace

int vqkv::eval_main(int argc, char** argv, const Methods& methods, const DeviceForms* device) {
  CLI::App app("vqkv-eval: replays generation with a compressed KV cache and says what it cost.", "vqkv-eval");
  set_up(app);

  ReplayVerb replay;
  GenerateVerb generate, strategy;
  MemoryVerb memory;
  SpeedVerb speed;
  TablesVerb tables;
  OutputFlags flags;
  std::string what;

  replay.common.attention = generate.common.attention = strategy.common.attention = kReplayAttention;
  strategy.strategy = "quantspec";
  auto* r = app.add_subcommand("replay", "teacher-forced replay: KLD and perplexity against the exact cache");
  add_common(*r, replay.common, flags, true);
  add_exec(*r, replay.common);
  add_device_flag(*r, replay.common.device);
  add_text_flags(*r, replay.text);
  r->add_option("--mode", replay.mode, "forced, stepwise, prefill-exact or fake-quant (below)")->capture_default_str();
  r->add_option("--context", replay.context, "tokens a window; windows don't overlap")
      ->capture_default_str()
      ->check(CLI::Range(2, 1 << 24));
  r->add_option("--windows", replay.windows, "windows, taken from the documents in turn; 0: all")
      ->capture_default_str()
      ->check(CLI::Range(0, 1 << 24));
  r->add_option("--block", replay.block, "queries a block in mode forced")
      ->capture_default_str()
      ->check(CLI::Range(1, 1 << 20));
  r->add_option("--prompt", replay.prompt, "tokens of the exact prompt in mode prefill-exact; 0: half the context")
      ->capture_default_str()
      ->check(CLI::Range(0, 1 << 24));
  r->add_option("--buckets", replay.buckets, "position buckets in the JSON")
      ->capture_default_str()
      ->check(CLI::Range(1, 1024));
  r->add_flag("!--skip-no-window", replay.no_window_rows, "leave out the rows without any window (half the time)");
  r->add_option("--metrics", replay.metrics, "groups of columns: kld, ppl")
      ->capture_default_str()
      ->delimiter(',')
      ->check(CLI::IsMember({"kld", "ppl"}));
  r->add_option("-o,--out", replay.out, "also write the full JSON to this file");
  std::string modes = "Modes:\n";
  for (const ReplayModeInfo& m : replay_modes()) modes += fmt::format("  {:<14} {}\n", m.name, m.meaning);
  r->footer(
      modes +
      "Examples:\n"
      "  vqkv-eval replay --model data/models/SmolLM2-135M-Instruct.Q4_1.gguf --codec out/best.codec.h5 --text "
      "data/jargon-3.txt\n"
      "  vqkv-eval replay --model M --codec a.codec.h5 --codec b.codec.h5 --text T --context 2048 --windows 4 --json");

  auto* g = app.add_subcommand("generate", "exact and compressed side by side, with the first divergence");
  add_common(*g, generate.common, flags, true);
  add_exec(*g, generate.common);
  add_prompt(*g, generate);
  add_device_flag(*g, generate.common.device);
  g->footer(
      "Examples:\n"
      "  vqkv-eval generate --model M --codec c.codec.h5 --chat --prompt \"What is a cache?\"\n"
      "  vqkv-eval generate --model M --codec c.codec.h5 --prompt-file data/held/kjv-0.txt --new-tokens 128 "
      "cache.window=16");

  auto* d = app.add_subcommand("strategy",
                               "what a strategy of decoding guesses right, reads and changes, the plain one beside it");
  add_common(*d, strategy.common, flags, true);
  add_prompt(*d, strategy);
  d->footer(
      "Examples:\n"
      "  vqkv-eval strategy --model M --codec quantspec.yaml --prompt-file data/held/kjv-0.txt --new-tokens 128\n"
      "  vqkv-eval strategy --model M --codec quantspec.yaml --prompt-file T --exact-prefill strategy.gamma=6 "
      "strategy.draft_weights=same --json");

  auto* m = app.add_subcommand("memory", "bytes by kind, allocator and process peak at several contexts");
  add_common(*m, memory.common, flags, false);
  auto* shape =
      m->add_option("--shape", memory.shape,
                    "in place of --model: formulas alone, without weights or training, at a shape of `vqkv-eval ls "
                    "shapes` or layers=32,q_heads=32,kv_heads=8,head_dim=128; codecs are then cell.yaml files, whose "
                    "traces are not read");
  m->get_option("--model")->required(false);
  m->add_option("--exceptions", memory.exceptions,
                "with --shape: share of the coded values that stay exact beside their codes, where a codec keeps such; "
                "how many they are only rows tell")
      ->needs(shape)
      ->capture_default_str();
  m->add_option("--context", memory.contexts, "contexts, e.g. 1k,4k,32k")->capture_default_str();
  m->add_option("--measure-up-to", memory.measured_up_to, "longer contexts show the ledger alone")
      ->capture_default_str();
  for (const char* of_a_model : {"--model", "--attention", "--weights", "--measure-up-to"})
    shape->excludes(m->get_option(of_a_model));
  m->add_option("--child-context", memory.child_context, "")->group("");
  m->footer(
      "Examples:\n"
      "  vqkv-eval memory --model M --codec c.codec.h5\n"
      "  vqkv-eval memory --model M --codec c.codec.h5 --context 512,2k,128k --json\n"
      "  vqkv-eval memory --shape llama-3.1-8b --codec configs/codecs/kivi.yaml --codec configs/codecs/qjl.yaml "
      "--context 4k,32k,128k");

  auto* s = app.add_subcommand("speed", "prefill and decode tokens/s, the exact cache in the same run");
  add_common(*s, speed.common, flags, false);
  add_device_flag(*s, speed.common.device);
  s->add_option("--prompt-tokens", speed.prompt_tokens, "prompt length")
      ->capture_default_str()
      ->check(CLI::Range(1, 1 << 24));
  s->add_option("--new-tokens", speed.new_tokens, "decode steps; 0: prefill alone")
      ->capture_default_str()
      ->check(CLI::Range(0, 1 << 24));
  s->add_option("--batch", speed.batch,
                "sequences of their own that decode together, one token each a step; tokens/s are of all of them")
      ->capture_default_str()
      ->check(CLI::Range(1, 1024));
  s->add_option("--repeats", speed.repeats, "alternating rounds; medians are shown")
      ->capture_default_str()
      ->check(CLI::Range(1, 1000));
  s->footer(
      "Examples:\n"
      "  vqkv-eval speed --model M --codec c.codec.h5 --threads 2\n"
      "  vqkv-eval speed --model M --codec c.codec.h5 --prompt-tokens 2048 --new-tokens 32 --repeats 5\n"
      "  vqkv-eval speed --model M --codec c.codec.h5 --batch 16");

  auto* t =
      app.add_subcommand("tables", "what papers print, beside our ledger at their shapes and what was measured here");
  t->add_option("papers", tables.papers, "names of `vqkv-eval ls tables`, all, or FILE.yaml of the same form")
      ->capture_default_str();
  add_measured(*t, tables);
  flags.add_to(*t);
  t->footer(
      "Examples:\n"
      "  vqkv-eval tables kivi\n"
      "  vqkv-eval replay --model M --codec kvquant.yaml --text wikitext-2-test.txt --mode fake-quant --json > r.json; "
      "vqkv-eval tables kvquant --measured r.json");

  auto* l = app.add_subcommand("ls", "what there is: modes, rules, policies, strategies, backends, shapes, tables");
  l->add_option(
       "what", what,
       "modes (of replay), rules (of cache.rule: when tokens are coded), policies (of cache.policy: which "
       "stay), strategies (of decoding), backends (of attention), shapes (of memory --shape) or tables (of papers)")
      ->required()
      ->check(CLI::IsMember({"modes", "rules", "policies", "strategies", "backends", "shapes", "tables"}));
  add_measured(*l, tables);
  flags.add_to(*l);
  l->footer("Examples:\n  vqkv-eval ls modes\n  vqkv-eval ls backends --format csv");

  return run_verb(app, argc, argv, methods, flags, [&](TableFormat format, const std::string& command) {
    for (CommonOptions* o : {&replay.common, &generate.common, &strategy.common, &memory.common, &speed.common}) {
      o->format = format;
      o->command = command;
      o->device.forms = device;
    }
    for (const auto& [verb, o] :
         {std::pair(r, &replay.common), std::pair(g, &generate.common), std::pair(s, &speed.common)}) {
      if (o->device.on_cpu()) continue;
      if (verb->get_option("--attention")->count() > 0)
        fail_usage("--attention names a backend of the CPU; --device cuda has its own");
      o->attention = kDeviceAttention;
    }
    if (*r) return run_replay(replay);
    if (*g) return run_generate(generate);
    if (*d) return run_strategy(strategy);
    if (*m) return run_memory(memory);
    if (*s) return run_speed(speed);
    tables.format = format;
    if (*t) return run_tables(tables);
    if (what == "tables") return list_tables(tables);
    if (!tables.measured.empty()) fail_usage("--measured goes with `ls tables`, not with `ls " + what + "`");
    return run_ls(what, format);
  });
}
