// Attention of one KV head over a long context, one thread: exact caches against codes, and the ways to attend to codes
// against each other. Google Benchmark gives time per call; use --benchmark_repetitions and read the medians.
//
// `bench_attention --regret` measures every way for many codes, shapes and contexts, prints what auto chose beside the
// fastest, and how much slower auto was. The constants of the rules in lib/attention come from its columns.
#include <benchmark/benchmark.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <ctime>

#include "attention/backends_cpu.h"
#include "attention/plan_codec.h"
#include "core/thread_pool.h"

namespace {

using namespace vqkv;
using namespace vqkv::test;

// slots codewords of 256 (or `entries`) a token and head: product codes, or residual codes over the whole head; or that
// many bytes of signs a key beside values of 2 bits in groups of 32, as QJL without outlier channels; or that many
// stages of complex codewords a key beside values of a bit a channel, as CommVQ; or 2-bit levels with a scale and a
// zero for 32 tokens of a channel of keys and 32 channels of a token of values, as KIVI.
enum class Kind { kProduct, kResidual, kSigns, kPairs, kAffine };
struct Codes {
  int slots, entries;
  Kind kind;
  std::string label() const {
    return fmt::format("{} {}x{}",
                       kind == Kind::kPairs      ? "pairs"
                       : kind == Kind::kSigns    ? "signs"
                       : kind == Kind::kAffine   ? "affine"
                       : kind == Kind::kResidual ? "rvq"
                                                 : "pq",
                       slots, entries);
  }
  std::shared_ptr<const CodecSet> make(const CacheShape& shape) const {
    return make_set(shape, 1, [&](Role role, int channels) {
      DecodePlan p = empty_plan(channels, kind == Kind::kAffine && role == Role::kKey ? 32 : 1);
      int bits = 0;
      while (1 << bits < entries) ++bits;
      if (kind == Kind::kProduct) {
        add_table(p, bits, channels / slots);
      } else if (kind == Kind::kResidual) {
        add_table(p, bits, channels, slots);
      } else if (kind == Kind::kPairs) {
        if (role == Role::kKey)
          add_pairs(p, shape.head_dim, bits, channels, slots);
        else
          add_signs(p, channels, channels, 0, false);
        if (role == Role::kValue) p.inner_bias = random_bias(channels, 7);
        add_token_scale(p, 1);
      } else if (kind == Kind::kAffine && role == Role::kKey) {
        add_levels(p, bits, 1, 32, false);
      } else if (role == Role::kValue) {
        add_levels(p, 2, 32, 1, true);
      } else {
        add_signs(p, 8 * slots, channels, 0, false);
        add_token_scale(p, 1);
      }
      return std::make_shared<PlanCodec>(p);
    });
  }
};

// A cache of `context` tokens with a block of queries appended and not yet attended.
class Scene {
 public:
  Scene(const CacheShape& shape, const Codes& codes, bool coded, DType exact, int64_t context, int64_t queries)
      : x_(shape, 4096, 5), out_(queries, x_.q.cols), queries_(queries) {
    CachePolicy policy;
    policy.codes = coded;
    policy.exact_dtype = exact;
    cache_ = std::make_unique<CompressedCache>(codes.make(shape), policy);
    for (int64_t t = 0; t < context; t += 4096) {
      const int64_t n = std::min<int64_t>(4096, context - t);
      cache_->begin_block(n);
      cache_->append(0, x_.k.view().slice_rows(0, n), x_.v.view().slice_rows(0, n));
      cache_->end_block();
    }
    cache_->begin_block(queries);
    cache_->append(0, x_.k.view().slice_rows(0, queries), x_.v.view().slice_rows(0, queries));
  }
  void attend(AttentionBackend& backend) {
    backend.attend(*cache_, 0, x_.q.view().slice_rows(1, queries_), out_);
    benchmark::DoNotOptimize(out_.data());
  }

 private:
  Tokens x_;
  Matrix<float> out_;
  int64_t queries_;
  std::unique_ptr<CompressedCache> cache_;
};

void step(benchmark::State& state, const char* backend_name, bool coded, DType exact, Codes codes) {
  const int64_t context = state.range(0);
  set_thread_count(1);
  const auto backend = make_attention_backend(backend_name);
  Scene scene(make_shape(1, static_cast<int>(state.range(1)), 1, static_cast<int>(state.range(2))), codes, coded, exact,
              context, 1);
  for (auto _ : state) scene.attend(*backend);
  state.counters["time/token"] = benchmark::Counter(
      static_cast<double>(context), benchmark::Counter::kIsIterationInvariantRate | benchmark::Counter::kInvert);
  state.counters["tokens/s"] =
      benchmark::Counter(static_cast<double>(context), benchmark::Counter::kIsIterationInvariantRate);
}

void shapes(benchmark::internal::Benchmark* b) {
  for (const int64_t context : {4096, 32768})
    for (const int64_t group : {3, 4})
      for (const int64_t d : {64, 128}) b->Args({context, group, d});
  b->ArgNames({"context", "group", "d"})->Unit(benchmark::kMicrosecond);
}

constexpr Codes kPq16{16, 256, Kind::kProduct}, kPq32{32, 256, Kind::kProduct}, kRvq8{8, 256, Kind::kResidual},
    kSigns256{32, 256, Kind::kSigns}, kPairs11{11, 64, Kind::kPairs}, kAffine2{128, 4, Kind::kAffine};
BENCHMARK_CAPTURE(step, exact_f16, "cpu-reconstruct", false, DType::kF16, kPq16)->Apply(shapes);
BENCHMARK_CAPTURE(step, exact_bf16, "cpu-reconstruct", false, DType::kBF16, kPq16)->Apply(shapes);
BENCHMARK_CAPTURE(step, pq_reconstruct, "cpu-reconstruct", true, DType::kBF16, kPq16)->Apply(shapes);
BENCHMARK_CAPTURE(step, pq_table, "cpu-table", true, DType::kBF16, kPq16)->Apply(shapes);
BENCHMARK_CAPTURE(step, pq_table8, "cpu-table8", true, DType::kBF16, kPq16)->Apply(shapes);
BENCHMARK_CAPTURE(step, pq32_table, "cpu-table", true, DType::kBF16, kPq32)->Apply(shapes);
BENCHMARK_CAPTURE(step, rvq8_table, "cpu-table", true, DType::kBF16, kRvq8)->Apply(shapes);
BENCHMARK_CAPTURE(step, signs_reconstruct, "cpu-reconstruct", true, DType::kBF16, kSigns256)->Apply(shapes);
BENCHMARK_CAPTURE(step, commvq_reconstruct, "cpu-reconstruct", true, DType::kBF16, kPairs11)->Apply(shapes);
BENCHMARK_CAPTURE(step, commvq_table, "cpu-table", true, DType::kBF16, kPairs11)->Apply(shapes);
BENCHMARK_CAPTURE(step, signs_table, "cpu-table", true, DType::kBF16, kSigns256)->Apply(shapes);
BENCHMARK_CAPTURE(step, affine_reconstruct, "cpu-reconstruct", true, DType::kBF16, kAffine2)->Apply(shapes);
BENCHMARK_CAPTURE(step, affine_table, "cpu-table", true, DType::kBF16, kAffine2)->Apply(shapes);

double processor_seconds() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

// Microseconds of processor time a call: the least of some rounds in which all ways take turns.
void measure(Scene& scene, const std::vector<AttentionBackend*>& ways, std::vector<double>& best) {
  best.assign(ways.size(), 1e30);
  double spent = 0;
  for (int round = 0; round < 200 && (round < 3 || spent < 0.06); ++round)
    for (size_t i = 0; i < ways.size(); ++i) {
      const double before = processor_seconds();
      scene.attend(*ways[i]);
      const double took = processor_seconds() - before;
      spent += took;
      best[i] = std::min(best[i], 1e6 * took);
    }
}

void regret() {
  set_thread_count(1);
  const std::vector<std::pair<KeyScan, ValueSums>> ways = {{KeyScan::kNone, ValueSums::kNever},
                                                           {KeyScan::kNone, ValueSums::kWherePays},
                                                           {KeyScan::kFixed, ValueSums::kNever},
                                                           {KeyScan::kFixed, ValueSums::kWherePays}};
  fmt::print("microseconds a call, one thread; decode or sums: what becomes of values\n");
  fmt::print("{:>12} {:>4} {:>2} {:>7} {:>7} | {:>10} {:>10} {:>10} {:>10} | {:>10}  {:<24} {}\n", "codes", "d", "G",
             "queries", "context", "keys+decode", "keys+sums", "tab+decode", "tab+sums", "auto", "chose", "regret");
  double worst = 0, total = 0;
  int cells = 0;
  for (const int64_t queries : {1, 128})
    for (const Codes& codes :
         {Codes{16, 256, Kind::kProduct}, Codes{32, 256, Kind::kProduct}, Codes{32, 16, Kind::kProduct},
          Codes{16, 64, Kind::kProduct}, Codes{8, 256, Kind::kResidual}, Codes{16, 1024, Kind::kResidual},
          Codes{16, 256, Kind::kSigns}, Codes{32, 256, Kind::kSigns}, Codes{128, 4, Kind::kAffine}})
      for (const int d : {64, 128})
        for (const int group : {1, 3, 4, 8})
          for (const int64_t context : {512, 2048, 8192, 32768}) {
            if (queries > 1 && context > 8192) continue;
            if (queries > 1 && group != 4 && group != 1) continue;
            Scene scene(make_shape(1, group, 1, d), codes, true, DType::kBF16, context, queries);
            std::vector<std::unique_ptr<AttentionBackend>> held;
            for (const auto& [scan, sums] : ways) held.push_back(make_tiled_backend(scan, sums));
            held.push_back(make_attention_backend("auto"));
            std::vector<AttentionBackend*> all;
            for (const auto& b : held) all.push_back(b.get());
            std::vector<double> us;
            measure(scene, all, us);
            // auto's own time is a second measurement of one of the ways; its regret is that way's.
            const std::string chose = fmt::format("{}", fmt::join(held.back()->paths(), "+"));
            double chosen = us.back(), least = 1e30;
            for (size_t i = 0; i < ways.size(); ++i) {
              least = std::min(least, us[i]);
              if (held[i]->paths().front() == chose) chosen = std::min(chosen, us[i]);
            }
            const double lost = std::max(0.0, chosen / least - 1);
            worst = std::max(worst, lost);
            total += lost;
            ++cells;
            fmt::print(
                "{:>12} {:>4} {:>2} {:>7} {:>7} | {:>10.1f} {:>10.1f} {:>10.1f} {:>10.1f} | {:>10.1f}  {:<24} "
                "{:.0f} %\n",
                codes.label(), d, group, queries, context, us[0], us[1], us[2], us[3], us[4], chose, 100 * lost);
            std::fflush(stdout);
          }
  fmt::print("{} cells: mean regret {:.1f} %, worst {:.0f} %\n", cells, 100 * total / cells, 100 * worst);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::string(argv[1]) == "--regret") {
    regret();
    return 0;
  }
  benchmark::Initialize(&argc, argv);
  benchmark::RunSpecifiedBenchmarks();
}
