#include "common/tool.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <signal.h>
#include <unistd.h>

#include <cstdio>
#include <new>

#include "core/error.h"
#include "core/json.h"
#include "core/version.h"

namespace vqkv {
namespace {
volatile sig_atomic_t g_signal = 0;

void on_signal(int signal_number) {
  const int reported = signal_number == SIGUSR1 ? SIGTERM : signal_number;
  if (g_signal != 0) _exit(128 + reported);
  g_signal = reported;
}
}  // namespace

const char* const kExitCodeHelp =
    "Exit codes: 0 ok, 1 internal failure, 2 usage or configuration, 3 bad input data or\n"
    "output that can't be written, 4 requested backend or device unavailable, 5 finished but\n"
    "some cells failed, 130/143 interrupted.";

void install_signal_handlers() {
  struct sigaction action {};
  action.sa_handler = on_signal;
  sigemptyset(&action.sa_mask);
  for (const int s : {SIGINT, SIGTERM, SIGUSR1}) sigaction(s, &action, nullptr);
  signal(SIGPIPE, SIG_IGN);  // a closed stdout is seen where it is written
  signal(SIGXFSZ, SIG_IGN);  // and so is a file beyond the size that is allowed
}

void hold_standard_files() {
  for (const int fd : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO})
    if (fcntl(fd, F_GETFD) < 0) open("/dev/null", O_RDONLY);  // the lowest that is free: this one
}

bool interrupted() { return g_signal != 0; }
int interrupt_signal() { return g_signal; }

int run_tool(const std::function<int()>& body) {
  int code = kExitInternal;
  try {
    code = body();
  } catch (const Error& e) {
    std::fprintf(stderr, "error: %s\n", e.what());
    code = static_cast<int>(e.kind());
  } catch (const std::bad_alloc&) { std::fprintf(stderr, "error: out of memory\n"); } catch (const std::exception& e) {
    std::fprintf(stderr, "error: internal: %s\n", e.what());
  }
  // A write that failed earlier left its mark, and the last flush may have had nothing more to write.
  if ((std::fflush(stdout) != 0 || std::ferror(stdout)) && (code == kExitOk || code == kExitSomeFailed)) {
    std::fprintf(stderr, "error: stdout could not be written\n");
    code = kExitBadData;
  }
  if (!interrupted()) return code;
  std::fprintf(stderr, "interrupted\n");  // after what the verb said of what it kept
  return 128 + interrupt_signal();
}

std::string version_text(const std::string& tool) {
  const Json f = version_facts();
  return fmt::format("{} {} (revision {}{}, {}, g++ {})", tool, f["version"].get<std::string>(),
                     f["revision"].get<std::string>(), f["dirty"].get<bool>() ? " with changes" : "",
                     f["build"].get<std::string>(), f["compiler"].get<std::string>());
}

std::string printable(const std::string& bytes) {
  return Json::parse(Json(bytes).dump(-1, ' ', false, Json::error_handler_t::replace)).get<std::string>();
}

std::string command_line(int argc, char** argv) {
  std::string out;
  for (int i = 0; i < argc; ++i) {
    std::string word = argv[i];
    if (i == 0) word = word.substr(word.find_last_of('/') + 1);
    const bool plain = !word.empty() && word.find_first_of(" \t\n'\"$\\*?[]{}()<>|&;#~") == std::string::npos;
    if (!plain) {
      std::string quoted = "'";
      for (const char c : word) quoted += c == '\'' ? std::string("'\\''") : std::string(1, c);
      word = quoted + "'";
    }
    out += (i ? " " : "") + word;
  }
  return out;
}

}  // namespace vqkv
