// The flags and the command-line manners that the three tools share.
#pragma once
#include <functional>
#include <string>

#include "common/device.h"
#include "common/table.h"
#include "common/tools.h"
#include "model/text_input.h"

namespace CLI {
class App;
}

namespace vqkv {

struct OutputFlags {
  std::string format = "md";
  bool json = false, quiet = false, verbose = false;
  int threads = 0;

  void add_to(CLI::App& verb, bool table = true);
  // Sets log level and thread count; what stdout is to look like.
  TableFormat apply() const;
};

// --model, which every verb that reads a model needs.
void add_model_flag(CLI::App& verb, std::string& model);
// --weights, and where a verb takes it --device.
void add_weights_flag(CLI::App& verb, DeviceChoice& device);
void add_device_flag(CLI::App& verb, DeviceChoice& device);

// --text, --token-ids, --special, --max-tokens.
void add_text_flags(CLI::App& verb, TextSources& text);

// A tool before its verbs are added: signals, --version, the exit codes in --help, one verb a call.
void set_up(CLI::App& app);

// Parses, registers `methods`, applies `flags` and runs `verb` with the format and the command line as one string; the
// exit code (run_tool's). --help and --version end with 0, a mistake is told as "error: ..." with the nearest name. A
// list of files (--text, --token-ids) ends where an override (key=value) stands.
int run_verb(CLI::App& app, int argc, char** argv, const Methods& methods, const OutputFlags& flags,
             const std::function<int(TableFormat format, const std::string& command)>& verb);

}  // namespace vqkv
