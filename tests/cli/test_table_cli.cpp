// Tables on a terminal: what is wider than it stands row by row, and nothing is lost.
#include <pty.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "support/catch.h"
#include "support/run_tool.h"
#include "support/test_folder.h"

namespace {

std::string on_terminal(unsigned short columns, std::vector<std::string> arguments) {
  const winsize size{.ws_row = 24, .ws_col = columns, .ws_xpixel = 0, .ws_ypixel = 0};
  int terminal = 0;
  const pid_t child = forkpty(&terminal, nullptr, nullptr, &size);
  REQUIRE(child >= 0);
  if (child == 0) {
    std::string tool = VQKV_BINARY_DIR "/bin/vqkv-sweep";
    std::vector<char*> argv{tool.data()};
    for (auto& a : arguments) argv.push_back(a.data());
    argv.push_back(nullptr);
    execv(tool.c_str(), argv.data());
    _exit(127);
  }
  std::string out;
  char buffer[4096];
  for (ssize_t n = 0; (n = read(terminal, buffer, sizeof buffer)) > 0;)
    for (ssize_t i = 0; i < n; ++i)
      if (buffer[i] != '\r') out += buffer[i];
  int status = 0;
  waitpid(child, &status, 0);
  close(terminal);
  CHECK((WIFEXITED(status) && WEXITSTATUS(status) == 0));
  return out;
}

}  // namespace

TEST_CASE("a table wider than the terminal is printed row by row", "[cli][sweep]") {
  const std::string wide = on_terminal(1000, {"ls", "policies"}), narrow = on_terminal(40, {"ls", "policies"});
  INFO(wide << narrow);
  CHECK(wide.rfind("| name", 0) == 0);
  CHECK(narrow.find('|') == std::string::npos);
  CHECK(narrow.rfind("name", 0) == 0);
  CHECK(narrow.find("\n\nname") != std::string::npos);
  for (const char* name : {"h2o", "snapkv", "streaming"}) {
    CHECK(wide.find(name) != std::string::npos);
    CHECK(narrow.find(name) != std::string::npos);
  }
  // Other formats, and what is no terminal, are the same everywhere.
  CHECK(on_terminal(40, {"ls", "policies", "--json"}) == on_terminal(1000, {"ls", "policies", "--json"}));
}

TEST_CASE("output that can't be written is an error in every tool", "[cli][sweep]") {
  const vqkv::TestFolder dir;
  for (const std::string tool : {"vqkv-dump", "vqkv-sweep", "vqkv-eval"})
    for (const std::string words : {"--help", "--version", "ls policies", "ls policies --json"})
      for (const std::string out : {"> /dev/full", ">&-"}) {
        if (tool == "vqkv-dump" && words.starts_with("ls")) continue;
        const std::string err = dir / "stderr",
                          command = VQKV_BINARY_DIR "/bin/" + tool + " " + words + " " + out + " 2> " + err;
        INFO(command);
        const int status = std::system(command.c_str());
        CHECK((WIFEXITED(status) && WEXITSTATUS(status) == 3));
        CHECK(vqkv::text_of(err) == "error: stdout could not be written\n");
      }
}
