// main() of a fuzz target where libFuzzer isn't at hand: replays inputs, and mutates them blindly.
//   fuzz_NAME [--mutate SECONDS | --runs N] [--seed N] FILE|FOLDER...
// Every input runs once; then, if asked, mutations of them for a time or a number of runs. An input that crashes, runs
// longer than 10 s or needs more than 4 GiB is written to crash-NAME in the current folder and ends the program.
#include <fcntl.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <filesystem>
#include <fstream>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

constexpr unsigned kSecondsAnInput = 10;
constexpr size_t kMaxInput = size_t{1} << 20;

// For the signal handlers, which may only read plain memory and call write().
const uint8_t* g_data = nullptr;
size_t g_size = 0;
char g_crash_path[512];

void save_input() {
  const int fd = ::open(g_crash_path, O_WRONLY | O_CREAT | O_TRUNC, 0644);
  if (fd >= 0) {
    size_t done = 0;
    while (done < g_size) {
      const ssize_t n = ::write(fd, g_data + done, g_size - done);
      if (n <= 0) break;
      done += static_cast<size_t>(n);
    }
    ::close(fd);
  }
}

void say(const char* text) {
  if (::write(2, text, std::strlen(text)) < 0) return;
}

extern "C" void on_signal(int signal) {
  save_input();
  say(signal == SIGALRM ? "\nHANG, input kept in " : "\nCRASH, input kept in ");
  say(g_crash_path);
  say("\n");
  std::signal(signal, SIG_DFL);
  if (signal == SIGALRM) ::_exit(70);
  ::raise(signal);
}

void run(const std::vector<uint8_t>& input) {
  // A copy of exactly this size, so that a sanitizer sees a read beyond its end.
  std::vector<uint8_t> copy(input);
  copy.shrink_to_fit();
  g_data = copy.data();
  g_size = copy.size();
  ::alarm(kSecondsAnInput);
  try {
    LLVMFuzzerTestOneInput(copy.data(), copy.size());
  } catch (const std::exception& e) {
    say("\nuncaught exception: ");
    say(e.what());
    std::abort();
  }
  ::alarm(0);
}

void collect(const std::filesystem::path& path, std::vector<std::vector<uint8_t>>& corpus) {
  if (std::filesystem::is_directory(path)) {
    std::vector<std::filesystem::path> files;
    for (const auto& entry : std::filesystem::directory_iterator(path)) files.push_back(entry.path());
    std::sort(files.begin(), files.end());
    for (const auto& file : files) collect(file, corpus);
    return;
  }
  std::ifstream in(path, std::ios::binary);
  if (!in) {
    std::fprintf(stderr, "%s: can't be opened\n", path.c_str());
    std::exit(2);
  }
  corpus.emplace_back(std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>());
}

using Rng = std::mt19937_64;
size_t below(Rng& rng, size_t n) { return n ? static_cast<size_t>(rng() % n) : 0; }

void overwrite(std::vector<uint8_t>& v, size_t at, const void* bytes, size_t n) {
  for (size_t i = 0; i < n && at + i < v.size(); ++i) v[at + i] = static_cast<const uint8_t*>(bytes)[i];
}

void mutate_once(std::vector<uint8_t>& v, const std::vector<std::vector<uint8_t>>& corpus, Rng& rng) {
  static const uint64_t edges[] = {0,
                                   1,
                                   2,
                                   0x7f,
                                   0x80,
                                   0xff,
                                   0x100,
                                   0x7fff,
                                   0x8000,
                                   0xffff,
                                   0x10000,
                                   0x7fffffff,
                                   0x80000000,
                                   0xffffffff,
                                   0x100000000,
                                   0x7fffffffffffffff,
                                   0x8000000000000000,
                                   0xffffffffffffffff};
  static const char* const texts[] = {"-1",
                                      "0",
                                      "1e308",
                                      "NaN",
                                      "null",
                                      "18446744073709551615",
                                      "9223372036854775807",
                                      "{}",
                                      "[]",
                                      "[[[[[[[[",
                                      "\"",
                                      "\\u0000",
                                      "\xff\xfe",
                                      "true",
                                      "0.5",
                                      ":",
                                      ",",
                                      "{",
                                      "}",
                                      "\n"};
  const size_t at = below(rng, v.size() + 1);
  switch (below(rng, 11)) {
    case 0:
      if (at < v.size()) v[at] = static_cast<uint8_t>(v[at] ^ (1u << below(rng, 8)));
      break;
    case 1:
      if (at < v.size()) v[at] = static_cast<uint8_t>(rng());
      break;
    case 2:  // an edge value as a 1-, 2-, 4- or 8-byte little-endian integer
    case 3: {
      const uint64_t edge = edges[below(rng, std::size(edges))] + (below(rng, 4) == 0 ? below(rng, 5) : 0);
      overwrite(v, at, &edge, size_t{1} << below(rng, 4));
      break;
    }
    case 4:
      v.resize(at);
      break;
    case 5:
      v.erase(v.begin() + static_cast<std::ptrdiff_t>(at),
              v.begin() + static_cast<std::ptrdiff_t>(std::min(v.size(), at + 1 + below(rng, 32))));
      break;
    case 6: {  // a piece of this input once more
      const size_t from = below(rng, v.size() + 1);
      const std::vector<uint8_t> piece(
          v.begin() + static_cast<std::ptrdiff_t>(from),
          v.begin() + static_cast<std::ptrdiff_t>(std::min(v.size(), from + 1 + below(rng, 64))));
      v.insert(v.begin() + static_cast<std::ptrdiff_t>(at), piece.begin(), piece.end());
      break;
    }
    case 7: {  // the head of this input, the tail of another
      if (corpus.empty()) break;
      const auto& other = corpus[below(rng, corpus.size())];
      const size_t from = below(rng, other.size() + 1);
      v.resize(at);
      v.insert(v.end(), other.begin() + static_cast<std::ptrdiff_t>(from), other.end());
      break;
    }
    case 8: {
      const std::string text = texts[below(rng, std::size(texts))];
      v.insert(v.begin() + static_cast<std::ptrdiff_t>(at), text.begin(), text.end());
      break;
    }
    case 9: {
      const char* text = texts[below(rng, std::size(texts))];
      overwrite(v, at, text, std::strlen(text));
      break;
    }
    default: {  // another digit where there is one: texts stay well-formed
      for (size_t i = at; i < v.size(); ++i)
        if (v[i] >= '0' && v[i] <= '9') {
          v[i] = static_cast<uint8_t>('0' + below(rng, 10));
          break;
        }
    }
  }
  if (v.size() > kMaxInput) v.resize(kMaxInput);
}

}  // namespace

int main(int argc, char** argv) {
  double seconds = 0;
  long runs = 0;
  uint64_t seed = 1;
  std::vector<std::vector<uint8_t>> corpus;
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    const auto number = [&] { return i + 1 < argc ? argv[++i] : "0"; };
    if (arg == "--mutate")
      seconds = std::atof(number());
    else if (arg == "--runs")
      runs = std::atol(number());
    else if (arg == "--seed")
      seed = std::strtoull(number(), nullptr, 10);
    else
      collect(arg, corpus);
  }
  std::snprintf(g_crash_path, sizeof g_crash_path, "crash-%s", std::filesystem::path(argv[0]).filename().c_str());
  for (const int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGALRM, SIGTRAP}) std::signal(signal, on_signal);
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)  // which reserve terabytes of address space
  const rlimit limit{rlim_t{4} << 30, rlim_t{4} << 30};
  ::setrlimit(RLIMIT_AS, &limit);
#endif

  run({});
  for (const auto& input : corpus) run(input);
  long done = 0;
  Rng rng(seed);
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  while (done < runs || (seconds > 0 && std::chrono::steady_clock::now() < end)) {
    std::vector<uint8_t> input = corpus.empty() ? std::vector<uint8_t>{} : corpus[below(rng, corpus.size())];
    for (size_t n = 1 + below(rng, 6); n > 0; --n) mutate_once(input, corpus, rng);
    run(input);
    ++done;
  }
  std::printf("%s: %zu inputs, %ld mutations, no crash\n", std::filesystem::path(argv[0]).filename().c_str(),
              corpus.size(), done);
  return 0;
}
