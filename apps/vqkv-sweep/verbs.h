// The verbs of vqkv-sweep; command_line.cpp parses, these do.
#pragma once
#include <string>
#include <vector>

#include "common/table.h"

namespace vqkv::sweep {

struct Common {
  TableFormat format = TableFormat::kMarkdown;
  std::string command;  // the command line, for provenance
};

struct PlanVerb {
  std::string file;
  std::vector<std::string> overrides;
  std::string out, group;
  bool dry_run = false;
};

struct RunVerb {
  std::string plan, out, shard, writer, time_budget;
  int jobs = 1;
  bool retry_failed = false, fail_fast = false, keep_codecs = false, trust_trace = false;
};

struct BestVerb {
  std::string folder, budget, by = "attention.softmax_kl", column = "resident", context;
  int64_t sequences = 0;  // 0: not given
  int top = 5;
};

struct ExportVerb {
  std::string folder, cell, out;
};

struct JudgeVerb {
  std::string trace, recon;
  std::vector<std::string> overrides;
  int64_t bytes = 0;
};

struct EncodeVerb {
  std::string codecs, trace, out;
  std::vector<std::string> overrides;
};

int run_ls(const std::string& what, const Common& common);
// Of a configuration where `name` is a FILE.yaml, which alone takes overrides.
int run_explain(const std::string& name, const std::vector<std::string>& overrides, const Common& common);
int run_plan_verb(const PlanVerb& verb, const Common& common);
int run_run(const RunVerb& verb, const Common& common);
int run_status(const std::string& folder, bool cells, const Common& common);
int run_merge(const std::string& folder, const Common& common);
int run_report(const std::string& folder, const std::string& out);
int run_best(const BestVerb& verb, const Common& common);
int run_export(const ExportVerb& verb, const Common& common);
int run_judge(const JudgeVerb& verb, const Common& common);
int run_encode(const EncodeVerb& verb, const Common& common);

// "55m", "2h", "90s", "90" -> seconds; kUsage otherwise.
double parse_duration(const std::string& text);

}  // namespace vqkv::sweep
