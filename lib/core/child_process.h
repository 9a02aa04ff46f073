// Another program beside this one, spoken to over its stdin and stdout. Runs without a shell, in a process group of its
// own: a Ctrl-C is this program's to answer.
#pragma once
#include <cstddef>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace vqkv {

// Words of a command: parted by blanks; '...' and "..." join, a backslash takes the next character as it is (within
// "..." only before " and \). Nothing is expanded. kUsage for a quote without its end, and for no word at all.
std::vector<std::string> split_command(const std::string& command);

class ChildProcess {
 public:
  // Looks the first word up in PATH. kUsage when it can't be started. The child ends with the thread that starts it at
  // the latest.
  explicit ChildProcess(const std::vector<std::string>& words);
  // end_together of itself alone.
  ~ChildProcess();
  ChildProcess(const ChildProcess&) = delete;
  ChildProcess& operator=(const ChildProcess&) = delete;

  enum class End { kDone, kClosed, kTimeout, kStopped };
  struct Exchange {
    End end = End::kDone;
    size_t received = 0;
  };
  // Writes all of `send` and reads until `receive` is full, both at once and neither waiting for the other. kClosed:
  // the child closed its stdout, or its stdin before all was written. kTimeout: `seconds` passed. kStopped: `stop`,
  // asked every tenth of a second, said so. `look` sees what has come whenever more has, and may throw.
  Exchange exchange(std::span<const std::byte> send, std::span<std::byte> receive, double seconds,
                    const std::function<bool()>& stop = {},
                    const std::function<void(std::span<const std::byte>)>& look = {});

  // Closes the stdin of each, waits briefly for all of them, then ends those that are left and their process groups:
  // several take no longer than one. Nothing can be said to a child afterwards; one that has ended stays as it is.
  static void end_together(std::span<ChildProcess* const> children);
  // Sends a signal to it and its process group.
  void signal(int number);

  // Bytes that it has written and nobody has read.
  size_t unread() const;

  // What became of it, for messages: "exit code 3", "killed by signal 9 (Killed)", "still running". Waits a moment for
  // one that is about to end.
  std::string state();
  // Its exit code; -1 while it runs and where a signal ended it. Waits as state() does.
  int exit_code();
  // The end of what it wrote to stderr, at most 2 KiB, as it came.
  std::string stderr_tail();
  // state() and stderr_tail() as a message ends with them.
  std::string last_words();

 private:
  struct Parts;
  std::unique_ptr<Parts> parts_;
};

}  // namespace vqkv
