// vqkv-sweep: trains codecs on some documents of a trace, measures them on others, at counted bytes.
#include <CLI/CLI.hpp>

#include "common/flags.h"
#include "common/tools.h"
#include "verbs.h"

using namespace vqkv;
using namespace vqkv::sweep;

int vqkv::sweep_main(int argc, char** argv, const Methods& methods) {
  CLI::App app(
      "vqkv-sweep: trains KV-cache codecs on some documents of a trace and measures them on others, at counted bytes.",
      "vqkv-sweep");
  set_up(app);

  OutputFlags flags;
  std::string what, name, folder, report_out = "report.html";
  std::vector<std::string> explain_overrides;
  bool all_cells = false;
  PlanVerb plan;
  RunVerb run;
  BestVerb best;
  ExportVerb exported;
  JudgeVerb judge;
  EncodeVerb encoded;

  auto* ls =
      app.add_subcommand("ls", "what there is: codecs, transforms, rules, policies, strategies, metrics, backends");
  ls->add_option("what", what,
                 "codecs, transforms, rules (of cache.rule: when tokens are coded), policies (of cache.policy: which "
                 "stay), strategies (of decoding), metrics or backends")
      ->required();
  flags.add_to(*ls);
  ls->footer("Examples:\n  vqkv-sweep ls codecs\n  vqkv-sweep ls metrics --format csv");

  auto* explain = app.add_subcommand("explain",
                                     "a codec, transform, rule, policy, strategy or metric: knobs, ranges, bits, "
                                     "paper, caveat; or the tiers of a cell");
  explain->add_option("name", name, "as `ls` prints it, or KIND.NAME; or a cell: FILE.yaml")->required();
  explain->add_option("overrides", explain_overrides, "path=value, with a FILE.yaml");
  flags.add_to(*explain);
  explain->footer(
      "Examples:\n  vqkv-sweep explain rvq\n  vqkv-sweep explain softmax_kl --json\n"
      "  vqkv-sweep explain cell.yaml trace.path=t.trace.h5");

  auto* p = app.add_subcommand("plan", "expand a sweep into frozen cells");
  p->add_option("sweep", plan.file, "YAML file")->required();
  p->add_option("overrides", plan.overrides,
                "path=value, e.g. codec.bits=4 trace.path=t.trace.h5 'sweep.grid.codec.bits=[2, 4]'");
  p->add_option("-o,--out", plan.out, "plan.jsonl");
  p->add_option("--group", plan.group, "merge one of the file's `groups` over the rest, e.g. test");
  p->add_flag("--dry-run", plan.dry_run,
              "write nothing; count cells and bytes and estimate time by training one layer");
  flags.add_to(*p);
  p->footer(
      "Examples:\n"
      "  vqkv-sweep plan configs/sweeps/first-look.yaml trace.path=t.trace.h5 --dry-run\n"
      "  vqkv-sweep plan configs/sweeps/first-look.yaml trace.path=t.trace.h5 'trace.report=[5]' cache.window=64 -o "
      "plan.jsonl");

  auto* r = app.add_subcommand("run", "run the cells that the store lacks; run again to resume");
  r->add_option("plan", run.plan, "plan.jsonl")->required();
  r->add_option("-o,--out", run.out, "result folder")->required();
  r->add_option("--jobs", run.jobs, "cells at once, one thread each; 1: a cell takes all threads")
      ->capture_default_str()
      ->check(CLI::Range(1, 1024));
  r->add_option("--shard", run.shard, "i/n, or auto (Slurm, Open MPI, PMI)");
  r->add_option("--writer", run.writer, "name of this run's results file (default: main, or the shard's)");
  r->add_option("--time-budget", run.time_budget, "take no new cell after this long: 90s, 55m, 2h");
  r->add_flag("--retry-failed", run.retry_failed, "run failed cells again");
  r->add_flag("--fail-fast", run.fail_fast, "stop at the first failed cell");
  r->add_flag("--trust-trace", run.trust_trace,
              "don't verify traces; by default each is read once to hold its values against its content hash");
  r->add_flag(
      "--keep-codecs", run.keep_codecs,
      "keep trained codecs in the folder: export need not train again, and shards that share a training train once");
  flags.add_to(*r);
  r->footer(
      "Examples:\n"
      "  vqkv-sweep run plan.jsonl -o out/\n"
      "  vqkv-sweep run plan.jsonl -o out/ --shard auto --time-budget 55m --threads 8");

  const auto folder_verb = [&](const char* verb, const char* help, const char* examples) {
    auto* s = app.add_subcommand(verb, help);
    s->add_option("folder", folder, "result folder")->required();
    s->footer(examples);
    return s;
  };
  auto* status = folder_verb("status", "cells done, failed, skipped and pending",
                             "Examples:\n  vqkv-sweep status out/\n  vqkv-sweep status out/ --cells --format csv");
  status->add_flag("--cells", all_cells, "one row a cell");
  flags.add_to(*status);
  auto* merge = folder_verb(
      "merge", "write results.sqlite and results.csv",
      "Examples:\n  vqkv-sweep merge out/\n  vqkv-sweep merge out/ && sqlite3 out/results.sqlite 'select * from cell'");
  flags.add_to(*merge);
  auto* report =
      folder_verb("report", "a self-contained HTML page of the results",
                  "Examples:\n  vqkv-sweep report out/ -o report.html\n  vqkv-sweep report out/ -o out/report.html -q");
  report->add_option("-o,--out", report_out, "HTML file")->capture_default_str();
  flags.add_to(*report, false);

  auto* b = folder_verb(
      "best", "the best cells under a byte budget, chosen on select documents",
      "Examples:\n  vqkv-sweep best out/ --budget 2.5bpv\n"
      "  vqkv-sweep best out/ --budget 512MiB --by output.relative_error --context 32k --column shared --sequences 64");
  b->add_option("--budget", best.budget, "bits a value (2.5bpv) or bytes a sequence (512MiB)")->required();
  b->add_option("--by", best.by, "measurement to choose by")->capture_default_str();
  b->add_option("--column", best.column,
                "what the budget limits: resident, shared (with constants) or codes (codes and side data alone)")
      ->capture_default_str();
  b->add_option("--context", best.context, "tokens, e.g. 4k (default: the longest planned)");
  b->add_option("--sequences", best.sequences, "that share the constants, with --column shared (default: 1)")
      ->check(CLI::Range(1, 1'000'000));
  b->add_option("--top", best.top, "rows")->capture_default_str()->check(CLI::Range(1, 1'000'000));
  flags.add_to(*b);

  auto* e = folder_verb("export", "the frozen codecs of a cell",
                        "Examples:\n  vqkv-sweep export out/ --cell 3fa91c02 -o best.codec.h5\n  vqkv-sweep export "
                        "out/ --cell 3fa9 -o best.codec.h5 --threads 2");
  e->add_option("--cell", exported.cell, "id of a cell, or its beginning")->required();
  e->add_option("-o,--out", exported.out, "codec file")->required();
  flags.add_to(*e);

  auto* j = app.add_subcommand("judge", "keys and values that another program reconstructed, through the same metrics");
  j->add_option("trace", judge.trace, "trace that was coded")->required();
  j->add_option("recon", judge.recon, "HDF5 file with /key and /value; docs/judge.md")->required();
  j->add_option("overrides", judge.overrides, "path=value: trace.report=[3] cache.window=64 metrics=[softmax_kl]");
  j->add_option("--bytes", judge.bytes, "bytes that the codec keeps for all tokens of the trace, side data included")
      ->required()
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 60));
  flags.add_to(*j);
  j->footer(
      "Examples:\n  vqkv-sweep judge t.trace.h5 recon.h5 --bytes 1843200\n"
      "  vqkv-sweep judge t.trace.h5 recon.h5 --bytes 1843200 'trace.report=[5, 6]' cache.window=128 --json");

  auto* c = app.add_subcommand("encode", "the codes that a frozen codec makes of a trace, for other programs");
  c->add_option("codec", encoded.codecs, "FILE.codec.h5")->required();
  c->add_option("trace", encoded.trace, "trace of the same model")->required();
  c->add_option("overrides", encoded.overrides,
                "path=value: trace.report=[3], cache.sinks, cache.prompt, cache.exact_dtype");
  c->add_option("-o,--out", encoded.out, "FILE.codes.h5; docs/formats.md")->required();
  flags.add_to(*c);
  c->footer(
      "Examples:\n  vqkv-sweep encode best.codec.h5 t.trace.h5 -o t.codes.h5\n"
      "  vqkv-sweep encode best.codec.h5 t.trace.h5 'trace.report=[5]' -o t.codes.h5 && "
      "scripts/vqkv.py check best.codec.h5 t.codes.h5");

  return run_verb(app, argc, argv, methods, flags, [&](TableFormat format, const std::string& command) {
    const Common common{format, command};
    if (*ls) return run_ls(what, common);
    if (*explain) return run_explain(name, explain_overrides, common);
    if (*p) return run_plan_verb(plan, common);
    if (*r) return run_run(run, common);
    if (*status) return run_status(folder, all_cells, common);
    if (*merge) return run_merge(folder, common);
    if (*report) return run_report(folder, report_out);
    best.folder = exported.folder = folder;
    if (*b) return run_best(best, common);
    if (*e) return run_export(exported, common);
    if (*c) return run_encode(encoded, common);
    return run_judge(judge, common);
  });
}
