// What the three tools share: error kinds to exit codes, signals, the threads and quiet flags, version.
#pragma once
#include <functional>
#include <string>
#include <vector>

namespace vqkv {

enum ExitCode : int {
  kExitOk = 0,
  kExitInternal = 1,
  kExitUsage = 2,
  kExitBadData = 3,  // or output that can't be written
  kExitUnavailable = 4,
  kExitSomeFailed = 5,  // finished, some cells failed
};

// For each tool's --help footer.
extern const char* const kExitCodeHelp;

// Runs `body`; an Error's message goes to stderr as "error: ..." and its kind becomes the exit code, bad_alloc and the
// rest become 1. A body that ends while interrupted() gives "interrupted" and 128 + signal; what was printed and can't
// be written, kExitBadData.
int run_tool(const std::function<int()>& body);

// SIGINT, SIGTERM (and Slurm's SIGUSR1 as SIGTERM): the first asks to stop, the second ends the process at once.
void install_signal_handlers();
// Puts what can't be written to in place of standard files that are closed: a file opened later would stand there, and
// take what is printed.
void hold_standard_files();

bool interrupted();
int interrupt_signal();

// "vqkv-sweep 0.1.0 (revision abc, release), FAISS ..., HDF5 ..." for --version.
std::string version_text(const std::string& tool);

// The command line as one string, for provenance.
std::string command_line(int argc, char** argv);

// UTF-8 for a table or JSON: bytes that are only part of a character become U+FFFD.
std::string printable(const std::string& bytes);

}  // namespace vqkv
