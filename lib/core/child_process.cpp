#include "core/child_process.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <utility>

#include "core/clock.h"
#include "core/error.h"

namespace vqkv {
namespace {

constexpr size_t kTail = 2048;
constexpr double kGrace = 2.0;  // seconds to end by itself after its stdin was closed
constexpr int kSlice = 100;     // milliseconds between two looks at `stop`

struct Descriptor {
  int fd = -1;
  Descriptor() = default;
  explicit Descriptor(int of) : fd(of) {}
  Descriptor(Descriptor&& o) noexcept : fd(std::exchange(o.fd, -1)) {}
  Descriptor& operator=(Descriptor&& o) noexcept {
    std::swap(fd, o.fd);
    return *this;
  }
  ~Descriptor() { close(); }
  void close() {
    if (fd >= 0) ::close(std::exchange(fd, -1));
  }
};

struct Pipe {
  Descriptor read, write;
  Pipe() {
    std::array<int, 2> ends{};
    // Closed on exec: another child must not hold this one's stdin open.
    if (::pipe2(ends.data(), O_CLOEXEC) != 0) fail_internal(fmt::format("pipe: {}", std::strerror(errno)));
    read = Descriptor(ends[0]);
    write = Descriptor(ends[1]);
  }
};

void set_nonblocking(const Descriptor& d) { ::fcntl(d.fd, F_SETFL, ::fcntl(d.fd, F_GETFL) | O_NONBLOCK); }

// A child that is gone makes write() fail with EPIPE, whatever the process does about SIGPIPE.
class NoSigpipe {
 public:
  NoSigpipe() {
    sigemptyset(&pipe_);
    sigaddset(&pipe_, SIGPIPE);
    sigset_t pending;
    sigpending(&pending);
    was_pending_ = sigismember(&pending, SIGPIPE) == 1;
    pthread_sigmask(SIG_BLOCK, &pipe_, &before_);
  }
  ~NoSigpipe() {
    const timespec now{};
    if (!was_pending_) sigtimedwait(&pipe_, nullptr, &now);
    pthread_sigmask(SIG_SETMASK, &before_, nullptr);
  }
  NoSigpipe(const NoSigpipe&) = delete;
  NoSigpipe& operator=(const NoSigpipe&) = delete;

 private:
  sigset_t pipe_, before_;
  bool was_pending_ = false;
};

// Between fork and exec: nothing here allocates.
[[noreturn]] void become(char* const* argv, int in, int out, int err, int failure) {
  setpgid(0, 0);
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  for (const int s : {SIGPIPE, SIGXFSZ, SIGINT, SIGTERM, SIGUSR1}) signal(s, SIG_DFL);
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, nullptr);
  dup2(in, STDIN_FILENO);
  dup2(out, STDOUT_FILENO);
  dup2(err, STDERR_FILENO);
  execvp(argv[0], argv);
  const int error = errno;
  if (::write(failure, &error, sizeof error) < 0) _exit(126);
  _exit(127);
}

}  // namespace

std::vector<std::string> split_command(const std::string& command) {
  std::vector<std::string> words;
  bool open = false;  // a word has begun
  char quote = 0;
  for (size_t i = 0; i < command.size(); ++i) {
    const char c = command[i];
    const bool last = i + 1 == command.size();
    if (quote == 0 && (c == ' ' || c == '\t' || c == '\n')) {
      open = false;
      continue;
    }
    if (!open) words.emplace_back();
    open = true;
    if (quote != 0 && c == quote) {
      quote = 0;
    } else if (quote == 0 && (c == '\'' || c == '"')) {
      quote = c;
    } else if (c == '\\' && !last &&
               (quote == 0 || (quote == '"' && (command[i + 1] == '"' || command[i + 1] == '\\')))) {
      words.back() += command[++i];
    } else {
      words.back() += c;
    }
  }
  if (quote != 0) fail_usage(fmt::format("the command `{}` has no end to its {}", command, quote));
  if (words.empty() || words[0].empty()) fail_usage("an empty command");
  return words;
}

struct ChildProcess::Parts {
  pid_t child = -1;
  Descriptor in, out, err;  // this side's ends of its stdin, stdout and stderr
  bool ended = false;
  bool reaped = false;  // its number may be another's
  siginfo_t end{};      // how, when it has
  std::string tail;

  // Whether the child has ended; waits for it up to `seconds`, taking what it writes to stderr. It isn't reaped here:
  // until then nobody else gets its number, nor its group's.
  bool wait(double seconds) {
    if (reaped) return true;
    const Stopwatch time;
    do {
      drain_stderr();
      ended = ended || (::waitid(P_PID, static_cast<id_t>(child), &end, WEXITED | WNOHANG | WNOWAIT) == 0 &&
                        end.si_pid == child);
      if (ended) break;
      pollfd p{err.fd, POLLIN, 0};
      ::poll(&p, err.fd >= 0 ? 1 : 0, 5);
    } while (time.seconds() < seconds);
    drain_stderr();
    return ended;
  }
  void drain_stderr() {
    std::array<char, 4096> buffer;
    while (err.fd >= 0) {
      const ssize_t n = ::read(err.fd, buffer.data(), buffer.size());
      if (n < 0 && errno == EINTR) continue;
      if (n < 0 && errno == EAGAIN) return;
      if (n <= 0) return err.close();
      tail.append(buffer.data(), static_cast<size_t>(n));
      if (tail.size() > kTail) tail.erase(0, tail.size() - kTail);
    }
  }
};

ChildProcess::ChildProcess(const std::vector<std::string>& words) : parts_(std::make_unique<Parts>()) {
  VQKV_CHECK(!words.empty());
  Pipe in, out, err, failure;
  std::vector<char*> argv;
  for (const auto& w : words) argv.push_back(const_cast<char*>(w.c_str()));
  argv.push_back(nullptr);
  const pid_t child = ::fork();
  if (child < 0) fail_internal(fmt::format("fork: {}", std::strerror(errno)));
  if (child == 0) become(argv.data(), in.read.fd, out.write.fd, err.write.fd, failure.write.fd);
  setpgid(child, child);  // as the child does, whoever is first
  parts_->child = child;
  failure.write.close();
  int error = 0;
  ssize_t n = 0;
  while ((n = ::read(failure.read.fd, &error, sizeof error)) < 0 && errno == EINTR) {}
  if (n == sizeof error) {
    while (::waitpid(child, nullptr, 0) < 0 && errno == EINTR) {}
    fail_usage(fmt::format("'{}' can't be started: {}", words[0], std::strerror(error)));
  }
  parts_->in = std::move(in.write);
  parts_->out = std::move(out.read);
  parts_->err = std::move(err.read);
  for (const Descriptor* d : {&parts_->in, &parts_->out, &parts_->err}) set_nonblocking(*d);
}

ChildProcess::~ChildProcess() {
  ChildProcess* const self = this;
  end_together({&self, 1});
}

void ChildProcess::end_together(std::span<ChildProcess* const> children) {
  std::vector<Parts*> left;
  for (ChildProcess* const c : children)
    if (!c->parts_->reaped) left.push_back(c->parts_.get());
  // In turns: one that fills its stderr meanwhile is read, too.
  const auto wait = [&] {
    const Stopwatch time;
    bool all = false;
    while (!all && time.seconds() < kGrace) {
      all = true;
      for (Parts* const p : left) all = p->wait(0) && all;
    }
  };
  for (Parts* const p : left) {
    p->in.close();
    p->out.close();
  }
  wait();
  for (Parts* const p : left)
    if (!p->ended) ::kill(-p->child, SIGTERM);
  wait();
  for (Parts* const p : left) {
    ::kill(-p->child, SIGKILL);  // with all that it started in its group, had it ended long ago
    while (!p->wait(kGrace)) {}
    while (::waitpid(p->child, nullptr, 0) < 0 && errno == EINTR) {}
    p->reaped = true;
  }
}

void ChildProcess::signal(int number) {
  if (!parts_->reaped) ::kill(-parts_->child, number);
}

ChildProcess::Exchange ChildProcess::exchange(std::span<const std::byte> send, std::span<std::byte> receive,
                                              double seconds, const std::function<bool()>& stop,
                                              const std::function<void(std::span<const std::byte>)>& look) {
  Parts& p = *parts_;
  const NoSigpipe quiet;
  const Stopwatch time;
  Exchange done;
  size_t sent = 0;
  while (sent < send.size() || done.received < receive.size()) {
    if (stop && stop()) return {End::kStopped, done.received};
    const double left = seconds - time.seconds();
    if (left <= 0) return {End::kTimeout, done.received};
    std::array<pollfd, 3> at{{{sent < send.size() ? p.in.fd : -1, POLLOUT, 0},
                              {done.received < receive.size() ? p.out.fd : -1, POLLIN, 0},
                              {p.err.fd, POLLIN, 0}}};
    const int wait = static_cast<int>(std::min<double>(kSlice, 1 + 1000 * left));
    if (::poll(at.data(), at.size(), wait) < 0 && errno != EINTR)
      fail_internal(fmt::format("poll: {}", std::strerror(errno)));
    if (at[2].revents != 0) p.drain_stderr();
    if (at[1].revents != 0) {
      const ssize_t n = ::read(p.out.fd, receive.data() + done.received, receive.size() - done.received);
      if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR)) return {End::kClosed, done.received};
      if (n > 0) done.received += static_cast<size_t>(n);
      if (n > 0 && look) look(receive.first(done.received));
    }
    if (at[0].revents != 0) {
      const ssize_t n = ::write(p.in.fd, send.data() + sent, send.size() - sent);
      if (n < 0 && errno != EAGAIN && errno != EINTR) return {End::kClosed, done.received};
      if (n > 0) sent += static_cast<size_t>(n);
    }
  }
  return done;
}

size_t ChildProcess::unread() const {
  int n = 0;
  return ::ioctl(parts_->out.fd, FIONREAD, &n) == 0 ? static_cast<size_t>(n) : 0;
}

std::string ChildProcess::state() {
  Parts& p = *parts_;
  if (!p.wait(0.5)) return "still running";
  if (p.end.si_code == CLD_EXITED) return fmt::format("exit code {}", p.end.si_status);
  return fmt::format("killed by signal {} ({})", p.end.si_status, strsignal(p.end.si_status));
}

int ChildProcess::exit_code() {
  Parts& p = *parts_;
  return p.wait(0.5) && p.end.si_code == CLD_EXITED ? p.end.si_status : -1;
}

std::string ChildProcess::stderr_tail() {
  parts_->drain_stderr();
  return parts_->tail;
}

std::string ChildProcess::last_words() {
  const std::string how = state(), tail = stderr_tail();
  return how + (tail.empty() ? ", nothing on its stderr" : ", its stderr ends with:\n" + tail);
}

}  // namespace vqkv
