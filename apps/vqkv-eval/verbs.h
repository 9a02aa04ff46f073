// The verbs of vqkv-eval. command_line.cpp parses; each verb prints its result to stdout.
#pragma once
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "cache/exec_codec.h"
#include "cache/policy.h"
#include "codec/codec_set.h"
#include "common/device.h"
#include "common/table.h"
#include "core/json.h"
#include "experiment/cell_config.h"
#include "experiment/replay_rows.h"
#include "generation/replay.h"
#include "model/runtime.h"
#include "model/text_input.h"

namespace vqkv::eval {

struct CommonOptions {
  std::string model;
  std::vector<std::string> codecs;     // exact | FILE.codec.h5 | cell.yaml | exec:COMMAND
  std::vector<std::string> overrides;  // key=value, applied to every codec but exact
  std::string attention = "auto";      // of the CPU
  DeviceChoice device;
  double exec_seconds = 60;  // that an answer of exec:COMMAND may take
  TableFormat format = TableFormat::kMarkdown;
  std::string command;  // for provenance
};

struct ReplayVerb {
  CommonOptions common;
  TextSources text;
  std::string mode = "forced";
  int64_t context = 1024, windows = 6, block = 256, prompt = 0;
  int buckets = 4;
  bool no_window_rows = true;
  std::vector<std::string> metrics{"kld", "ppl"};
  std::string out;  // also write the full JSON here
};

struct GenerateVerb {  // and of `strategy`
  CommonOptions common;
  std::string strategy = "plain";
  std::string prompt, prompt_file;
  bool chat = false, thinking = true, special = false, exact_prefill = false, ignore_stop = false;
  int64_t new_tokens = 64;
  double temperature = 0, top_p = 1;
  int64_t top_k = 0;
  uint64_t seed = 1;
};

struct MemoryVerb {
  CommonOptions common;
  std::string shape;      // in place of a model: formulas alone
  double exceptions = 0;  // at a shape: share of the coded values that stay exact beside their codes
  std::string contexts = "1k,4k,32k";
  std::string measured_up_to = "4k";  // longer contexts show the ledger alone
  int64_t child_context = -1;         // hidden: this process is one measurement
};

struct SpeedVerb {
  CommonOptions common;
  int64_t prompt_tokens = 512, new_tokens = 64;
  int batch = 1;  // sequences that decode together
  int repeats = 3;
};

struct TablesVerb {
  std::vector<std::string> papers{"all"};  // names, or files *.yaml
  std::vector<std::string> measured;       // result files
  TableFormat format = TableFormat::kMarkdown;
};

int run_replay(const ReplayVerb& v);
int run_generate(const GenerateVerb& v);
int run_strategy(const GenerateVerb& v);
int run_memory(const MemoryVerb& v);
int run_memory_at_shape(const MemoryVerb& v);  // of run_memory
int run_speed(const SpeedVerb& v);
int run_tables(const TablesVerb& v);
int list_tables(const TablesVerb& v);  // of `ls tables`
int run_ls(const std::string& what, TableFormat format);

// ---- shared by the verbs ----

std::unique_ptr<ModelRuntime> open_model(const CommonOptions& common);
// Refuses a codec that was trained for another model (kBadData) and a backend that can't run it (kUnavailable). Without
// codecs when a training was interrupted.
LoadedCodec load_codec(const std::string& spec, const CommonOptions& common, const ModelFacts& model);
// Refuses (kUnavailable) a cache that the device of `common` has no form of, before anything runs on it; `hint` ends
// the message. On the CPU nothing: load_codec has looked.
void require_device_form(const CommonOptions& common, const std::string& label, std::shared_ptr<const CodecSet> codecs,
                         const CachePolicy& policy, const std::string& hint = "");
// All of --codec; empty when a training was interrupted.
std::vector<LoadedCodec> load_codecs(const CommonOptions& common, const ModelFacts& model);
// kUsage for overrides that reach no codec: they would be lost without a word.
void refuse_idle_overrides(const CommonOptions& common);
// Rows are told apart by their labels: the second "rtn" among `seen` is "rtn #2".
std::string own_label(std::map<std::string, int>& seen, const std::string& label);
// Of a codec from a file: "exact" is the row of the exact cache, which is told apart by it.
std::string file_label(const std::filesystem::path& path, const std::string& label);
// kUsage for the cell of a file that is of some layers or heads only, or whose cache rules have no use for an override.
void check_cell_file(const CellConfig& cell, const std::string& path, const CommonOptions& common);
std::vector<ReplayText> read_texts(const TextSources& text, const ModelRuntime& model);
// Warns of codecs whose exact rows have another type than those of the exact cache beside them, which has the first's.
void warn_of_exact_rows(std::span<const LoadedCodec> codecs);
// Caches that are held at once.
struct HeldCaches {
  std::string label;
  const CodecSet& codecs;
  CachePolicy policy;
  int64_t sequences = 1;
  int64_t beside = 0;  // bytes of another tier, which the ledger of these codecs doesn't count
};
// Refuses (kUsage) caches that don't fit this machine's memory together, before any of it is taken: sinks are allocated
// whole with the first token. What a policy gives up counts as kept, since that depends on the text.
void require_cache_memory(std::span<const HeldCaches> caches, int64_t tokens);

// Codecs in other programs, ended together whatever ends the verb.
struct Programs {
  std::vector<std::shared_ptr<const ExecCodec>> running;
  void add(const std::shared_ptr<const ExecCodec>& program) {
    if (program) running.push_back(program);
  }
  ~Programs() { ExecCodec::end_together(running); }
};
// Refuses (kUsage) exec:COMMAND for a verb that has no use for it.
void refuse_exec(const CommonOptions& common, const std::string& reason);
// The columns bits_per_value, _1 and _64 of a row. Bytes that another program claims are no ledger's: the first then
// says whose they are, beside exact sinks and window, and the others stay empty.
void add_bits(Json& row, const ByteLedger& ledger, const CacheShape& shape, int64_t tokens,
              const Json& codec_config = {}, const std::optional<int64_t>& claimed = {});
std::vector<Column> bits_columns();  // what shows them: resident, and with the constants shared by 1 and 64 sequences
// A row of `memory`: what a sequence of so many tokens holds by kind. The columns for it, with others before its bits.
Json memory_row(const std::string& label, const CachePolicy& policy, const Json& codec_config, const ByteLedger& ledger,
                const CacheShape& shape, int64_t tokens);
std::vector<Column> memory_columns(std::span<const Column> before_bits = {});
std::vector<int64_t> memory_contexts(const MemoryVerb& v);  // kUsage for what is none

}  // namespace vqkv::eval
