// vqkv-dump: records what a model's KV cache holds, and looks at such records.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <iostream>

#include "common/tool.h"
#include "core/error.h"
#include "core/log.h"
#include "core/thread_pool.h"
#include "verbs.h"

using namespace vqkv;
using namespace vqkv::dump;

namespace {

struct Flags {
  std::string format = "md";
  bool json = false, quiet = false, verbose = false;
  int threads = 0;
};

void add_common(CLI::App& verb, Flags& f) {
  verb.add_option("--format", f.format, "what goes to stdout: md, csv, json or jsonl")
      ->capture_default_str()
      ->check(CLI::IsMember({"md", "csv", "json", "jsonl"}));
  verb.add_flag("--json", f.json, "short for --format json");
  verb.add_option("--threads", f.threads, "threads for everything (default: all processors)")
      ->check(CLI::Range(1, 1024));
  verb.add_flag("-q,--quiet", f.quiet, "no progress, warnings only");
  verb.add_flag("-v,--verbose", f.verbose, "more on stderr");
}

void add_text(CLI::App& verb, TextOptions& t) {
  verb.add_option("--text", t.texts, "UTF-8 text files, one document a file")->check(CLI::ExistingFile);
  verb.add_option("--token-ids", t.token_ids,
                  "files of token ids in place of texts: a JSON array, or numbers parted by space")
      ->check(CLI::ExistingFile);
  verb.add_option("--max-tokens", t.max_tokens, "at most so many tokens of each document; 0: all")
      ->check(CLI::NonNegativeNumber);
}

// The nearest flag of the verb (or verb of the tool) to what was not understood.
std::string suggestion(const CLI::App& app, const std::vector<std::string>& words) {
  const CLI::App* verb = &app;
  for (const CLI::App* sub : app.get_subcommands()) verb = sub;
  std::vector<std::string> known;
  for (const CLI::Option* o : verb->get_options())
    for (const std::string& name : o->get_lnames()) known.push_back("--" + name);
  for (const CLI::App* sub : verb->get_subcommands([](const CLI::App*) { return true; }))
    known.push_back(sub->get_name());
  for (const std::string& word : words) {
    const std::string bare = word.substr(0, word.find('='));
    if (std::find(known.begin(), known.end(), bare) != known.end()) continue;
    const std::string near = nearest_name(bare, known);
    if (!near.empty()) return "error: '" + bare + "' is not known; did you mean '" + near + "'?\n";
  }
  return "";
}

}  // namespace

int main(int argc, char** argv) {
  install_signal_handlers();
  CLI::App app("vqkv-dump: records keys, values and queries of a transformer, and looks at the record.");
  app.footer(kExitCodeHelp);
  app.set_version_flag("--version", version_text("vqkv-dump"));
  app.require_subcommand(1);
  Flags flags;
  CaptureVerb capture;
  InspectVerb inspect;
  TokensVerb tokens;
  std::string trace, model;

  auto* c = app.add_subcommand("capture", "read texts with the reference runtime and write a trace");
  c->add_option("--model", capture.model, "GGUF file or Hugging Face folder")->required();
  add_text(*c, capture.text);
  c->add_option("--context", capture.context, "tokens a window; windows don't overlap")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  c->add_option("--query-stride", capture.query_stride, "record the query of every n-th position")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  c->add_option("--query-tail", capture.query_tail, "and of the last n positions of each window")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  c->add_option("--dtype", capture.dtype, "stored type: bf16, f16 or f32")
      ->capture_default_str()
      ->check(CLI::IsMember({"bf16", "f16", "f32"}));
  c->add_option("--weights", capture.weights, "weights in memory: f32 or bf16")
      ->capture_default_str()
      ->check(CLI::IsMember({"f32", "bf16"}));
  c->add_option("--device", capture.device, "cpu")->capture_default_str()->check(CLI::IsMember({"cpu", "cuda"}));
  c->add_flag("!--no-output-weight", capture.output_weight, "leave W_O out (no error after W_O then)");
  c->add_flag("--dry-run", capture.dry_run, "print bytes and an estimated time, write nothing");
  c->add_option("-o,--out", capture.out, "the trace, by custom NAME.trace.h5");
  add_common(*c, flags);
  c->footer(
      "Examples:\n"
      "  vqkv-dump capture --model data/models/SmolLM2-135M-Instruct.Q4_1.gguf --text data/jargon-0.txt data/kjv-0.txt "
      "-o t.trace.h5\n"
      "  vqkv-dump capture --model ~/Qwen2.5-0.5B --text book.txt --context 8192 --max-tokens 65536 --dry-run");

  auto* i = app.add_subcommand("inspect",
                               "shapes, bytes, and per head: norms, kurtosis, outlier channels, before and after RoPE");
  i->add_option("trace", inspect.trace, "a trace")->required();
  i->add_option("--max-tokens", inspect.max_tokens, "look at the first n tokens only; 0: all")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  add_common(*i, flags);
  i->footer(
      "Examples:\n"
      "  vqkv-dump inspect t.trace.h5\n"
      "  vqkv-dump inspect t.trace.h5 --max-tokens 4096 --format csv > heads.csv");

  auto* v = app.add_subcommand("verify", "content hash, completeness, NaN");
  v->add_option("trace", trace, "a trace")->required();
  add_common(*v, flags);
  v->footer(
      "Examples:\n"
      "  vqkv-dump verify t.trace.h5\n"
      "  vqkv-dump verify t.trace.h5 --json");

  auto* m = app.add_subcommand("model", "facts of a model and its cache: bytes per token, head layout, RoPE");
  m->add_option("model", model, "GGUF file or Hugging Face folder")->required();
  add_common(*m, flags);
  m->footer(
      "Examples:\n"
      "  vqkv-dump model data/models/SmolLM2-135M-Instruct.Q4_1.gguf\n"
      "  vqkv-dump model ~/Llama-3.2-1B --json");

  auto* t = app.add_subcommand("tokens", "token ids of a text, as every tool will see them");
  t->add_option("--model", tokens.model, "GGUF file or Hugging Face folder")->required();
  add_text(*t, tokens.text);
  t->add_flag("--ids", tokens.ids, "plain ids, one line a document: what --token-ids reads");
  add_common(*t, flags);
  t->footer(
      "Examples:\n"
      "  vqkv-dump tokens --model data/models/SmolLM2-135M-Instruct.Q4_1.gguf --text data/jargon-0.txt --max-tokens "
      "20\n"
      "  vqkv-dump tokens --model M --text book.txt --ids > book.ids");

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    const int code = app.exit(e, std::cout, std::cerr);
    if (code == 0) return kExitOk;
    std::cerr << suggestion(app, std::vector<std::string>(argv + 1, argv + argc));
    return kExitUsage;
  }
  return run_tool([&] {
    if (flags.quiet) set_log_level(LogLevel::kWarning);
    if (flags.verbose) set_log_level(LogLevel::kDebug);
    if (flags.threads > 0) set_thread_count(flags.threads);
    const TableFormat format = flags.json ? TableFormat::kJson : table_format_from_name(flags.format);
    capture.format = inspect.format = tokens.format = format;
    capture.command = command_line(argc, argv);
    if (*c) return run_capture(capture);
    if (*i) return run_inspect(inspect);
    if (*v) return run_verify(trace, format);
    if (*m) return run_model(model, format);
    return run_tokens(tokens);
  });
}
