// Writing and reading a trace beside plain writing and reading of the same bytes, in one run. Bytes a second are of the
// trace's own bytes. Writing ends with fsync on both sides, inside the time; the content hash is left out (hash_seconds
// shows it), but the disk may go on writing meanwhile.
// VQKV_BENCH_DIR chooses the medium (a RAM disk shows our own cost, a disk shows the disk's).
#include <benchmark/benchmark.h>
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

#include "core/clock.h"
#include "core/rng.h"
#include "io/trace.h"

namespace {

using namespace vqkv;

constexpr int64_t kWindow = 2048, kWindows = 4;
constexpr size_t kPiece = size_t{128} << 10;  // one chunk of one head

TraceInfo info() {
  TraceInfo i;
  i.shape.layers = 30;
  i.shape.kv_heads = 3;
  i.shape.q_heads = 9;
  i.shape.head_dim = 64;
  i.shape.rope = RopeFacts::plain(64, 64, 1e5);
  i.shape.score_scale = 0.125f;
  i.stored = DType::kBF16;
  i.model_name = "bench";
  return i;
}

const TraceWindowData& window() {
  static const TraceWindowData data = [] {
    const CacheShape s = info().shape;
    TraceWindowData w;
    Rng rng(1);
    for (int64_t t = 0; t < kWindow; ++t) {
      w.token_id.push_back(static_cast<int32_t>(t));
      w.position.push_back(static_cast<int32_t>(t));
      if (t % 16 == 0 || t >= kWindow - 64) w.query_token.push_back(static_cast<int32_t>(t));
    }
    const auto fill = [&](int64_t rows, int64_t cols) {
      Matrix<float> m(rows, cols);
      for (auto& v : m.storage) v = static_cast<float>(rng.uniform()) - 0.5f;
      return m;
    };
    for (int l = 0; l < s.layers; ++l) {
      w.key.push_back(fill(kWindow, 192));
      w.value.push_back(fill(kWindow, 192));
      w.query.push_back(fill(static_cast<int64_t>(w.query_token.size()), 576));
      w.query_moment.emplace_back(3 * 64 * 64, 1.0);
      w.query_pair_moment.emplace_back(3 * 32, 1.0);
      w.received_mass.emplace_back(3 * kWindow, 0.5f);
      w.received_mass2.emplace_back(3 * kWindow, 0.25f);
    }
    return w;
  }();
  return data;
}

std::string place(const std::string& name) {
  const char* folder = std::getenv("VQKV_BENCH_DIR");
  return (std::filesystem::path(folder ? folder : std::filesystem::temp_directory_path().string()) /
          (name + std::to_string(getpid())))
      .string();
}

int64_t write_trace(const std::string& path, double* seconds, double* hash) {
  const int64_t queries = static_cast<int64_t>(window().query_token.size());
  TraceWriter writer(path, info(), {"a"}, kWindow * kWindows, queries * kWindows);
  for (int64_t i = 0; i < kWindows; ++i) writer.add(window());
  writer.finish();
  *seconds = writer.write_seconds();
  *hash = writer.hash_seconds();
  return writer.bytes_written();
}

void trace_write(benchmark::State& state) {
  const std::string path = place("bench-trace-");
  window();
  int64_t bytes = 0;
  double hash = 0, seconds = 0;
  for (auto _ : state) {
    std::filesystem::remove(path);
    bytes = write_trace(path, &seconds, &hash);
    state.SetIterationTime(seconds);
  }
  std::filesystem::remove(path);
  state.SetBytesProcessed(state.iterations() * bytes);
  state.counters["hash_seconds"] = hash;
}

void plain_write(benchmark::State& state) {
  const std::string path = place("bench-plain-"), trace = place("bench-size-");
  double seconds = 0, hash = 0;
  const int64_t bytes = write_trace(trace, &seconds, &hash);
  std::filesystem::remove(trace);
  std::vector<char> buffer(size_t{64} << 20);
  for (size_t i = 0; i < buffer.size(); ++i) buffer[i] = static_cast<char>(i * 31 >> 3);
  for (auto _ : state) {
    std::filesystem::remove(path);
    const Stopwatch watch;
    const int fd = ::open(path.c_str(), O_CREAT | O_TRUNC | O_WRONLY, 0644);
    for (int64_t at = 0; at < bytes; at += static_cast<int64_t>(kPiece)) {
      const size_t n = std::min(kPiece, static_cast<size_t>(bytes - at));
      if (::pwrite(fd, buffer.data() + static_cast<size_t>(at) % (buffer.size() - kPiece), n, at) !=
          static_cast<ssize_t>(n))
        state.SkipWithError("pwrite failed");
    }
    ::fsync(fd);
    ::close(fd);
    state.SetIterationTime(watch.seconds());
  }
  std::filesystem::remove(path);
  state.SetBytesProcessed(state.iterations() * bytes);
}

// Keys and values of every head, widened to f32, as training reads them.
void trace_read(benchmark::State& state) {
  const std::string path = place("bench-read-");
  double seconds = 0, hash = 0;
  write_trace(path, &seconds, &hash);
  {
    const TraceReader reader(path);
    Matrix<float> out(kWindow * kWindows, 64);
    for (auto _ : state)
      for (int l = 0; l < 30; ++l)
        for (int h = 0; h < 3; ++h) {
          reader.key(l, h, 0, out.rows, out);
          reader.value(l, h, 0, out.rows, out);
          benchmark::DoNotOptimize(out.data());
        }
  }
  std::filesystem::remove(path);
  state.SetBytesProcessed(state.iterations() * 30 * 3 * 2 * kWindow * kWindows * 64 * 2);
}

void plain_read(benchmark::State& state) {
  const std::string path = place("bench-read-");
  double seconds = 0, hash = 0;
  const int64_t bytes = write_trace(path, &seconds, &hash);
  std::vector<char> buffer(kPiece);
  const int fd = ::open(path.c_str(), O_RDONLY);
  for (auto _ : state)
    for (int64_t at = 0; at < bytes; at += static_cast<int64_t>(kPiece)) {
      if (::pread(fd, buffer.data(), kPiece, at) < 0) state.SkipWithError("pread failed");
      benchmark::DoNotOptimize(buffer.data());
    }
  ::close(fd);
  std::filesystem::remove(path);
  state.SetBytesProcessed(state.iterations() * bytes);
}

BENCHMARK(trace_write)->UseManualTime()->Iterations(5)->Unit(benchmark::kMillisecond);
BENCHMARK(plain_write)->UseManualTime()->Iterations(5)->Unit(benchmark::kMillisecond);
BENCHMARK(trace_read)->UseRealTime()->Iterations(5)->Unit(benchmark::kMillisecond);
BENCHMARK(plain_read)->UseRealTime()->Iterations(5)->Unit(benchmark::kMillisecond);

}  // namespace

BENCHMARK_MAIN();
