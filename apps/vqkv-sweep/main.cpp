// vqkv-sweep: trains codecs on some documents of a trace, measures them on others, at counted bytes.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <iostream>

#include "common/tool.h"
#include "core/error.h"
#include "core/log.h"
#include "core/thread_pool.h"
#include "verbs.h"

using namespace vqkv;
using namespace vqkv::sweep;

namespace {

// CLI11 names what it did not expect; this adds what was probably meant.
std::string suggestion(const CLI::App& app, int argc, char** argv) {
  const CLI::App* verb = nullptr;
  std::vector<std::string> verbs;
  for (const CLI::App* s : app.get_subcommands([](const CLI::App*) { return true; })) {
    verbs.push_back(s->get_name());
    if (argc > 1 && s->get_name() == argv[1]) verb = s;
  }
  if (!verb) {
    if (argc < 2 || argv[1][0] == '-') return "";
    const std::string near = nearest_name(argv[1], verbs);
    return near.empty() ? "" : "'" + std::string(argv[1]) + "' is not a verb; did you mean '" + near + "'?";
  }
  std::vector<std::string> flags;
  for (const CLI::Option* o : verb->get_options())
    for (const auto& n : o->get_lnames()) flags.push_back("--" + n);
  for (int i = 2; i < argc; ++i) {
    const std::string word = std::string(argv[i]).substr(0, std::string(argv[i]).find('='));
    if (!word.starts_with("--") || std::find(flags.begin(), flags.end(), word) != flags.end()) continue;
    const std::string near = nearest_name(word, flags);
    return "'" + word + "' is not an option of " + verb->get_name() +
           (near.empty() ? "" : "; did you mean '" + near + "'?");
  }
  return "";
}

}  // namespace

int main(int argc, char** argv) {
  install_signal_handlers();
  CLI::App app(
      "vqkv-sweep: trains KV-cache codecs on some documents of a trace and measures them on others, at counted bytes.");
  app.footer(kExitCodeHelp);
  app.set_version_flag("--version", version_text("vqkv-sweep"));
  app.require_subcommand(1);

  std::string format = "md", what, name, folder, report_out = "report.html";
  bool json = false, quiet = false, verbose = false, all_cells = false;
  int threads = 0;
  PlanVerb plan;
  RunVerb run;
  BestVerb best;
  ExportVerb exported;
  JudgeVerb judge;

  const auto common = [&](CLI::App* verb, bool table) {
    if (table) {
      verb->add_option("--format", format, "table on stdout: md, csv, json or jsonl")
          ->capture_default_str()
          ->check(CLI::IsMember({"md", "csv", "json", "jsonl"}));
      verb->add_flag("--json", json, "short for --format json");
    }
    verb->add_option("--threads", threads, "threads for everything (default: all processors)")
        ->check(CLI::Range(1, 1024));
    auto* q = verb->add_flag("-q,--quiet", quiet, "no progress, no warnings");
    verb->add_flag("-v,--verbose", verbose, "more on stderr")->excludes(q);
  };

  auto* ls = app.add_subcommand("ls", "what there is: codecs, transforms, policies, metrics, backends");
  ls->add_option("what", what, "codecs, transforms, policies, metrics or backends")->required();
  common(ls, true);
  ls->footer("Examples:\n  vqkv-sweep ls codecs\n  vqkv-sweep ls metrics --format csv");

  auto* explain =
      app.add_subcommand("explain", "a codec, transform, policy or metric: knobs, ranges, bits, paper, caveat");
  explain->add_option("name", name, "as `ls` prints it")->required();
  common(explain, true);
  explain->footer("Examples:\n  vqkv-sweep explain rvq\n  vqkv-sweep explain softmax_kl --json");

  auto* p = app.add_subcommand("plan", "expand a sweep into frozen cells");
  p->add_option("sweep", plan.file, "YAML file")->required();
  p->add_option("overrides", plan.overrides,
                "path=value, e.g. codec.bits=4 trace.path=t.trace.h5 sweep.grid.codec.bits=[2,4]");
  p->add_option("-o,--out", plan.out, "plan.jsonl");
  p->add_option("--group", plan.group, "merge one of the file's `groups` over the rest, e.g. test");
  p->add_flag("--dry-run", plan.dry_run,
              "write nothing; count cells and bytes and estimate time by training one layer");
  common(p, true);
  p->footer(
      "Examples:\n"
      "  vqkv-sweep plan configs/sweeps/first-look.yaml trace.path=t.trace.h5 --dry-run\n"
      "  vqkv-sweep plan configs/sweeps/first-look.yaml trace.path=t.trace.h5 'sweep.grid.codec.bits=[4, 6]' -o "
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
  r->add_flag("--keep-codecs", run.keep_codecs,
              "keep trained codecs in the folder, so that export need not train again");
  common(r, true);
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
  common(status, true);
  auto* merge = folder_verb(
      "merge", "write results.sqlite and results.csv",
      "Examples:\n  vqkv-sweep merge out/\n  vqkv-sweep merge out/ && sqlite3 out/results.sqlite 'select * from cell'");
  common(merge, true);
  auto* report =
      folder_verb("report", "a self-contained HTML page of the results",
                  "Examples:\n  vqkv-sweep report out/ -o report.html\n  vqkv-sweep report out/ -o out/report.html -q");
  report->add_option("-o,--out", report_out, "HTML file")->capture_default_str();
  common(report, false);

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
  b->add_option("--sequences", best.sequences, "that share the constants, with --column shared")->capture_default_str();
  b->add_option("--top", best.top, "rows")->capture_default_str()->check(CLI::Range(1, 1'000'000));
  common(b, true);

  auto* e = folder_verb("export", "the frozen codecs of a cell",
                        "Examples:\n  vqkv-sweep export out/ --cell 3fa91c02 -o best.codec.h5\n  vqkv-sweep export "
                        "out/ --cell 3fa9 -o best.codec.h5 --threads 2");
  e->add_option("--cell", exported.cell, "id of a cell, or its beginning")->required();
  e->add_option("-o,--out", exported.out, "codec file")->required();
  common(e, true);

  auto* j = app.add_subcommand("judge", "keys and values that another program reconstructed, through the same metrics");
  j->add_option("trace", judge.trace, "trace that was coded")->required();
  j->add_option("recon", judge.recon, "HDF5 file with /key and /value; docs/judge.md")->required();
  j->add_option("overrides", judge.overrides, "path=value: trace.report=[3] cache.window=64 metrics=[softmax_kl]");
  j->add_option("--bytes", judge.bytes, "bytes that the codec keeps for all tokens of the trace, side data included")
      ->required()
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 60));
  common(j, true);
  j->footer(
      "Examples:\n  vqkv-sweep judge t.trace.h5 recon.h5 --bytes 1843200\n"
      "  vqkv-sweep judge t.trace.h5 recon.h5 --bytes 1843200 'trace.report=[5, 6]' cache.window=128 --json");

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (app.exit(error, std::cout, std::cerr) == 0) return kExitOk;
    if (const std::string hint = suggestion(app, argc, argv); !hint.empty()) std::cerr << hint << "\n";
    return kExitUsage;
  }

  return run_tool([&] {
    if (quiet) set_log_level(LogLevel::kQuiet);
    if (verbose) set_log_level(LogLevel::kDebug);
    if (threads > 0) set_thread_count(threads);
    const Common c{json ? TableFormat::kJson : table_format_from_name(format), command_line(argc, argv)};
    if (*ls) return run_ls(what, c);
    if (*explain) return run_explain(name, c);
    if (*p) return run_plan_verb(plan, c);
    if (*r) return run_run(run, c);
    if (*status) return run_status(folder, all_cells, c);
    if (*merge) return run_merge(folder, c);
    if (*report) return run_report(folder, report_out);
    best.folder = exported.folder = folder;
    if (*b) return run_best(best, c);
    if (*e) return run_export(exported, c);
    return run_judge(judge, c);
  });
}
