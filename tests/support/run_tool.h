// Runs a tool of this build as a user does, and gives what it printed and how it ended.
#pragma once
#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

namespace vqkv {

struct ToolRun {
  int code = 0;  // exit code, or 128 + signal
  std::string out, err;
};

inline std::string text_of(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  std::stringstream s;
  s << in.rdbuf();
  return s.str();
}

// stdout and stderr go to FOLDER/stdout and FOLDER/stderr.
inline pid_t start_tool(const std::string& tool, const std::string& folder, const std::vector<std::string>& arguments) {
  const pid_t child = fork();
  if (child != 0) return child;
  const std::string path = std::string(VQKV_BINARY_DIR) + "/bin/" + tool;
  for (const auto& [name, descriptor] : {std::pair("/stdout", 1), std::pair("/stderr", 2)})
    dup2(open((folder + name).c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600), descriptor);
  std::vector<char*> argv{const_cast<char*>(path.c_str())};
  for (const auto& a : arguments) argv.push_back(const_cast<char*>(a.c_str()));
  argv.push_back(nullptr);
  execv(path.c_str(), argv.data());
  _exit(127);
}

// Waits until a tool that was started answers signals itself: before that they end it without a word.
inline void wait_for_handlers(pid_t child) {
  const std::string process = "/proc/" + std::to_string(child);
  const auto answers = [&] {
    std::error_code gone;
    // Until it is another program, it has the handlers of the tests.
    if (std::filesystem::read_symlink(process + "/exe", gone) == std::filesystem::read_symlink("/proc/self/exe"))
      return false;
    const std::string status = text_of(process + "/status"), name = "SigCgt:";
    const size_t at = status.find(name);
    return at != std::string::npos && std::stoull(status.substr(at + name.size()), nullptr, 16) >> (SIGTERM - 1) & 1;
  };
  siginfo_t end{};
  while (!answers() && waitid(P_PID, child, &end, WEXITED | WNOHANG | WNOWAIT) == 0 && end.si_pid == 0)
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

inline ToolRun finish_tool(const std::string& folder, pid_t child) {
  int status = 0;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {}
  return {WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status), text_of(folder + "/stdout"),
          text_of(folder + "/stderr")};
}

inline ToolRun run_tool_of_build(const std::string& tool, const std::string& folder,
                                 const std::vector<std::string>& arguments) {
  return finish_tool(folder, start_tool(tool, folder, arguments));
}

}  // namespace vqkv
