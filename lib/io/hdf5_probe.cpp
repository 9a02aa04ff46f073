// A forked child meets a hostile container first.
#include <fmt/format.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstring>

#include "core/error.h"
#include "io/hdf5_library.h"

#if defined(__has_feature)  // clang
#define VQKV_HAS(feature) __has_feature(feature)
#else
#define VQKV_HAS(feature) 0
#endif
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__) || VQKV_HAS(address_sanitizer)
#define VQKV_SHADOW_MEMORY 1  // terabytes of address space: a limit on it would only kill the child
#else
#define VQKV_SHADOW_MEMORY 0
#endif

namespace vqkv {

namespace {

std::atomic<bool> probe_enabled{true};

// Room beyond what the process has mapped already: a model may be mapped while a trace is opened.
constexpr rlim_t kExtraBytes = rlim_t{2} << 30;
constexpr rlim_t kProcessorSeconds = 20;  // counting the chunks of a 1 TB trace takes under 2

rlim_t mapped_bytes() {
  unsigned long pages = 0;
  if (FILE* f = std::fopen("/proc/self/statm", "r")) {
    if (std::fscanf(f, "%lu", &pages) != 1) pages = 0;
    std::fclose(f);
  }
  return static_cast<rlim_t>(pages) * static_cast<rlim_t>(sysconf(_SC_PAGESIZE));
}

void write_all(int fd, const char* data, size_t size) {
  while (size > 0) {
    const ssize_t n = ::write(fd, data, size);
    if (n <= 0) return;
    data += n;
    size -= static_cast<size_t>(n);
  }
}

[[noreturn]] void child_main(int out, rlim_t mapped, const std::function<void()>& inspect) {
  // The tools' own handlers must not run here, and a Ctrl-C is the parent's to answer.
  for (const int s : {SIGSEGV, SIGBUS, SIGABRT, SIGFPE, SIGILL, SIGXCPU}) std::signal(s, SIG_DFL);
  for (const int s : {SIGINT, SIGTERM}) std::signal(s, SIG_IGN);
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  const rlimit no_core{0, 0}, processor{kProcessorSeconds, kProcessorSeconds},
      space{mapped + kExtraBytes, mapped + kExtraBytes};
  setrlimit(RLIMIT_CORE, &no_core);
  setrlimit(RLIMIT_CPU, &processor);
  if (!VQKV_SHADOW_MEMORY) setrlimit(RLIMIT_AS, &space);
  int code = 0;
  try {
    inspect();
  } catch (const std::bad_alloc&) {
    static const char message[] = "asks for more memory than a file of this size can need";
    write_all(out, message, sizeof message - 1);
    code = 4;
  } catch (const Error& e) {
    write_all(out, e.what(), std::strlen(e.what()));
    code = 3;
  } catch (const std::exception& e) {
    write_all(out, e.what(), std::strlen(e.what()));
    code = 4;
  }
  _exit(code);
}

}  // namespace

void set_probe_enabled(bool enabled) { probe_enabled = enabled; }

void probe_in_child(const std::string& path, const std::function<void()>& inspect) {
  if (!probe_enabled) return;
  int pipe_fds[2];
  if (::pipe(pipe_fds) != 0) fail_internal(fmt::format("pipe: {}", std::strerror(errno)));
  const rlim_t mapped = mapped_bytes();
  pid_t child = -1;
  {
    const h5::Guard guard;  // the child inherits a library at rest
    child = ::fork();
    if (child == 0) {
      ::close(pipe_fds[0]);
      child_main(pipe_fds[1], mapped, inspect);
    }
  }
  ::close(pipe_fds[1]);
  if (child < 0) {
    ::close(pipe_fds[0]);
    fail_internal(fmt::format("{}: can't be probed: fork: {}", path, std::strerror(errno)));
  }
  std::string message;
  char buffer[4096];
  for (;;) {
    const ssize_t n = ::read(pipe_fds[0], buffer, sizeof buffer);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) break;
    if (message.size() < (1 << 16)) message.append(buffer, static_cast<size_t>(n));
  }
  ::close(pipe_fds[0]);
  int status = 0;
  while (::waitpid(child, &status, 0) < 0 && errno == EINTR) {}
  if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return;
  if (WIFEXITED(status) && WEXITSTATUS(status) == 3) fail_data(message);
  if (WIFEXITED(status)) fail_data(fmt::format("{}: {}", path, message.empty() ? "can't be opened" : message));
  const int signal = WTERMSIG(status);
  if (signal == SIGXCPU || signal == SIGKILL)
    fail_data(fmt::format("{}: a damaged container: libhdf5 found no end within {} processor seconds", path,
                          kProcessorSeconds));
  fail_data(fmt::format("{}: a damaged container: libhdf5 crashed on it ({})", path, strsignal(signal)));
}

}  // namespace vqkv
