#include "core/terminal.h"

#include <pty.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <string>

#include "core/log.h"
#include "support/catch.h"

using namespace vqkv;

TEST_CASE("columns are characters, not bytes") {
  CHECK(text_columns("3 \u00d7 \u00b1") == 5);
  CHECK(first_columns("3 \u00d7 \u00b1", 3) == "3 \u00d7");
  CHECK(first_columns("abc", 3) == "abc");
  CHECK(first_columns("abc", 0) == "");
}

TEST_CASE("progress never wraps on a terminal") {
  const winsize size{.ws_row = 24, .ws_col = 30, .ws_xpixel = 0, .ws_ypixel = 0};
  int terminal = 0;
  const pid_t child = forkpty(&terminal, nullptr, nullptr, &size);
  REQUIRE(child >= 0);
  if (child == 0) {
    Progress("cells", 2).update(2, std::string(100, 'x'));
    _exit(terminal_columns(STDERR_FILENO) == 30 ? 0 : 1);
  }
  std::string out;
  char buffer[512];
  for (ssize_t n = 0; (n = read(terminal, buffer, sizeof buffer)) > 0;) out.append(buffer, static_cast<size_t>(n));
  int status = 0;
  waitpid(child, &status, 0);
  close(terminal);
  CHECK((WIFEXITED(status) && WEXITSTATUS(status) == 0));
  const std::string clear = "\r\033[K", drawn = "cells 2/2";
  const size_t at = out.find(drawn);
  REQUIRE(at != std::string::npos);
  CHECK(std::min(out.find('\r', at), out.size()) - at == 30);
}
