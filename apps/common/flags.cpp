#include "common/flags.h"

#include <fmt/format.h>
#include <CLI/CLI.hpp>
#include <algorithm>
#include <filesystem>
#include <iostream>
#include <optional>
#include <vector>

#include "common/tool.h"
#include "core/cpu.h"
#include "core/error.h"
#include "core/log.h"
#include "core/names.h"
#include "core/thread_pool.h"

namespace vqkv {
namespace {

std::string bare(const std::string& word) { return word.substr(0, word.find('=')); }

// CLI11 names what it did not expect; this names what was probably meant.
std::string suggestion(const CLI::App& app, const std::vector<std::string>& words) {
  if (words.empty()) return "";
  const CLI::App* verb = nullptr;
  std::vector<std::string> known;
  for (const CLI::App* sub : app.get_subcommands([](const CLI::App*) { return true; })) {
    known.push_back(sub->get_name());
    if (sub->get_name() == words[0]) verb = sub;
  }
  if (!verb) return words[0].starts_with('-') ? "" : unknown_name("verb", words[0], known);
  known.clear();
  for (const CLI::Option* option : verb->get_options())
    if (!option->get_group().empty())
      for (const std::string& name : option->get_lnames()) known.push_back("--" + name);
  for (const std::string& word : words) {
    if (!word.starts_with("--") || word == "--" || std::find(known.begin(), known.end(), bare(word)) != known.end())
      continue;
    return unknown_name(fmt::format("option of {}:", verb->get_name()), bare(word), known);
  }
  return "";
}

// The exit code when there is nothing to run.
std::optional<int> parse_arguments(CLI::App& app, int argc, char** argv) {
  const std::vector<std::string> words(argv + 1, argv + argc);
  // Names of files come to stand in traces, records and tables: told now, not when minutes of work are written.
  for (const std::string& word : words)
    if (printable(word) != word)
      fail_usage(fmt::format("'{}' is not UTF-8, and what is written (JSON) knows no other text; rename the file",
                             printable(word)));
  std::vector<std::string> parsed;
  bool files = false;
  for (const std::string& word : words) {
    std::error_code error;
    if (word.starts_with('-')) files = word == "--text" || word == "--token-ids";
    const bool override_ = files && word.find('=') != std::string::npos && !std::filesystem::exists(word, error);
    parsed.insert(override_ ? parsed.begin() + 1 : parsed.end(), word);  // behind the verb
  }
  std::reverse(parsed.begin(), parsed.end());  // as CLI11 takes them
  try {
    app.parse(std::move(parsed));
  } catch (const CLI::ParseError& e) {
    if (e.get_exit_code() == 0) {
      app.exit(e, std::cout, std::cerr);
      return kExitOk;
    }
    const std::string hint = suggestion(app, words);
    std::cerr << "error: " << (hint.empty() ? e.what() : hint) << "\nRun with --help for more information.\n";
    return kExitUsage;
  }
  return std::nullopt;
}

}  // namespace

void OutputFlags::add_to(CLI::App& verb, bool table) {
  if (table) {
    verb.add_option("--format", format, "what goes to stdout: md, csv, json or jsonl")
        ->capture_default_str()
        ->check(CLI::IsMember({"md", "csv", "json", "jsonl"}));
    verb.add_flag("--json", json, "short for --format json");
  }
  verb.add_option("--threads", threads, "threads for everything (default: all processors)")->check(CLI::Range(1, 1024));
  auto* q = verb.add_flag("-q,--quiet", quiet, "no progress, warnings only");
  verb.add_flag("-v,--verbose", verbose, "build, processor and threads on stderr too")->excludes(q);
}

TableFormat OutputFlags::apply() const {
  if (quiet) set_log_level(LogLevel::kWarning);
  if (verbose) set_log_level(LogLevel::kDebug);
  if (threads > 0) set_thread_count(threads);
  log_debug(
      fmt::format("{}: {}, {}, {} threads", version_text("vqkv"), cpu_model_name(), cpu_arithmetic(), thread_count()));
  return json ? TableFormat::kJson : table_format_from_name(format);
}

void add_model_flag(CLI::App& verb, std::string& model) {
  verb.add_option("--model", model, "GGUF file or Hugging Face folder")->required();
}

void add_weights_flag(CLI::App& verb, DeviceChoice& device) {
  verb.add_option("--weights", device.weights,
                  "f32, or bf16: half the bytes; with fast bf16 products (AVX512-BF16 of AMD) inputs are rounded too")
      ->default_str("f32")
      ->check(CLI::IsMember({"f32", "bf16"}));
}

void add_device_flag(CLI::App& verb, DeviceChoice& device) {
  verb.add_option("--device", device.name, "cpu, or cuda: weights and inputs of products in bf16, sums in fp32")
      ->capture_default_str()
      ->check(CLI::IsMember({"cpu", "cuda"}));
}

void add_text_flags(CLI::App& verb, TextSources& text) {
  auto* texts =
      verb.add_option("--text", text.texts, "UTF-8 text files, one document a file")->check(CLI::ExistingFile);
  verb.add_option("--token-ids", text.token_ids,
                  "files of token ids in place of texts: a JSON array, or numbers parted by space")
      ->check(CLI::ExistingFile);
  verb.add_flag("--special", text.special, "special tokens written in the texts become their ids")->needs(texts);
  verb.add_option("--max-tokens", text.max_tokens, "at most so many tokens of each document; 0: all")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 40));
}

void set_up(CLI::App& app) {
  hold_standard_files();
  install_signal_handlers();
  app.footer(kExitCodeHelp);
  app.set_version_flag("--version", version_text(app.get_name()));
  app.require_subcommand(1);
}

int run_verb(CLI::App& app, int argc, char** argv, const Methods& methods, const OutputFlags& flags,
             const std::function<int(TableFormat, const std::string&)>& verb) {
  return run_tool([&] {
    if (const auto code = parse_arguments(app, argc, argv)) return *code;
    for (const Method* method : methods) register_method(*method);
    return verb(flags.apply(), command_line(argc, argv));
  });
}

}  // namespace vqkv
