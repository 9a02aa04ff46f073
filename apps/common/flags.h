// The flags and the command-line manners that the three tools share.
#pragma once
#include <optional>
#include <string>

#include "common/table.h"
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

// --text, --token-ids, --special, --max-tokens.
void add_text_flags(CLI::App& verb, TextSources& text);

// Parses; the exit code when there is nothing to run: after --help and --version, and after a mistake, which is told as
// "error: ..." with the nearest name. A list of files (--text, --token-ids) ends where an override (key=value) stands.
std::optional<int> parse_arguments(CLI::App& app, int argc, char** argv);

}  // namespace vqkv
