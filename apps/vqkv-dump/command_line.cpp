// vqkv-dump: records what a model's KV cache holds, and looks at such records.
#include <CLI/CLI.hpp>

#include "common/flags.h"
#include "common/tools.h"
#include "verbs.h"

using namespace vqkv;
using namespace vqkv::dump;

int vqkv::dump_main(int argc, char** argv, const Methods& methods, const DeviceForms* device) {
  CLI::App app("vqkv-dump: records keys, values and queries of a transformer, and looks at the record.", "vqkv-dump");
  set_up(app);
  OutputFlags flags;
  CaptureVerb capture;
  capture.device.forms = device;
  InspectVerb inspect;
  TokensVerb tokens;
  std::string trace, model;

  auto* c = app.add_subcommand("capture", "read texts with the reference runtime and write a trace");
  add_model_flag(*c, capture.model);
  add_text_flags(*c, capture.text);
  c->add_option("--context", capture.context, "tokens a window; windows don't overlap")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  c->add_option("--query-stride", capture.query_stride, "record the query of every n-th position")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  c->add_option("--query-tail", capture.query_tail, "and of the last n positions of each window")
      ->capture_default_str()
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 40));
  c->add_option("--dtype", capture.dtype, "stored type: bf16, f16 or f32")
      ->capture_default_str()
      ->check(CLI::IsMember({"bf16", "f16", "f32"}));
  add_weights_flag(*c, capture.device);
  add_device_flag(*c, capture.device);
  c->add_flag("!--no-output-weight", capture.output_weight, "leave W_O out (no error after W_O then)");
  c->add_option(
       "--gradients", capture.gradients,
       "record squared gradients of keys and values and their second moments: of the loss of the text's own next "
       "tokens (next-token) or of tokens drawn from the model (sampled); takes four times as long")
      ->check(CLI::IsMember({"next-token", "sampled"}));
  c->add_flag("--dry-run", capture.dry_run, "print bytes and an estimated time, write nothing");
  c->add_option("-o,--out", capture.out, "the trace, by custom NAME.trace.h5");
  flags.add_to(*c);
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
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 40));
  flags.add_to(*i);
  i->footer(
      "Examples:\n"
      "  vqkv-dump inspect t.trace.h5\n"
      "  vqkv-dump inspect t.trace.h5 --max-tokens 4096 --format csv > heads.csv");

  auto* v = app.add_subcommand("verify", "content hash, completeness, NaN");
  v->add_option("trace", trace, "a trace")->required();
  flags.add_to(*v);
  v->footer(
      "Examples:\n"
      "  vqkv-dump verify t.trace.h5\n"
      "  vqkv-dump verify t.trace.h5 --json");

  auto* m = app.add_subcommand("model", "facts of a model and its cache: bytes per token, head layout, RoPE");
  m->add_option("model", model, "GGUF file or Hugging Face folder")->required();
  flags.add_to(*m);
  m->footer(
      "Examples:\n"
      "  vqkv-dump model data/models/SmolLM2-135M-Instruct.Q4_1.gguf\n"
      "  vqkv-dump model ~/Llama-3.2-1B --json");

  auto* t = app.add_subcommand("tokens", "token ids of a text, as every tool will see them");
  add_model_flag(*t, tokens.model);
  add_text_flags(*t, tokens.text);
  t->add_flag("--ids", tokens.ids, "plain ids, one line a document: what --token-ids reads");
  flags.add_to(*t);
  t->footer(
      "Examples:\n"
      "  vqkv-dump tokens --model data/models/SmolLM2-135M-Instruct.Q4_1.gguf --text data/jargon-0.txt --max-tokens "
      "20\n"
      "  vqkv-dump tokens --model M --text book.txt --ids > book.ids");

  return run_verb(app, argc, argv, methods, flags, [&](TableFormat format, const std::string& command) {
    capture.format = inspect.format = tokens.format = format;
    capture.command = command;
    if (*c) return run_capture(capture);
    if (*i) return run_inspect(inspect);
    if (*v) return run_verify(trace, format);
    if (*m) return run_model(model, format);
    return run_tokens(tokens);
  });
}
