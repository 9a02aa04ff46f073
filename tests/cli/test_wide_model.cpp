// A random model with wide rows, where products are summed in several pieces: codes, codec files and measurements don't
// depend on threads, shards or interruptions.
#include "support/random_model.h"
#include "support/sweep_sameness.h"
#include "support/sweep_trace.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

// Rows of w_down: 4,992.
constexpr RandomModel kWide{.hidden = 96, .ffn = 4992, .head_dim = 32};

}  // namespace

TEST_CASE("rows of 4992: the same at any thread count, in shards, and after kill -9", "[cli][sweep][dump]") {
  const TestFolder dir;
  const std::string folder = dir.path.string();
  write_random_model(dir / "wide.gguf", kWide);
  std::vector<std::string> input{"--model", dir / "wide.gguf", "--context", "192", "--query-stride",
                                 "8",       "--token-ids"};
  for (uint64_t d = 0; d < 3; ++d) {
    Rng rng(100 + d);
    std::string ids;
    for (int t = 0; t < 192; ++t) ids += fmt::format("{} ", rng.below(kWide.vocab));
    write_file(dir / fmt::format("{}.ids", d), ids);
    input.push_back(dir / fmt::format("{}.ids", d));
  }
  CHECK(capture_hash(folder, dir / "one.trace.h5", 1, input) == capture_hash(folder, dir / "two.trace.h5", 2, input));

  write_file(
      dir / "s.yaml",
      fmt::format(
          "trace: {{path: {}, train: [0], select: [1], report: [2]}}\n"
          "cache: {{sinks: 4, window: 16, flush: 16}}\ncontexts: [4096]\n"
          "sweep:\n  grid:\n    codec:\n"
          "      - {{name: rtn, bits: 3, group: 16, transform: [hadamard]}}\n"
          "      - {{name: pq, codebooks: 8, bits: 5, iterations: 8, k: {{transform: [center, query_metric]}}}}\n"
          "      - {{name: rvq, codebooks: 6, bits: 6, beam: 4, refine: 1, iterations: 8, heads: all}}\n"
          "      - {{name: simvq, share: heads, codebooks: 4, bits: 5, rounds: 4}}\n",
          dir / "one.trace.h5"));
  succeed("vqkv-sweep", folder, {"plan", dir / "s.yaml", "-o", dir / "plan.jsonl", "-q"});
  check_sweep_sameness(folder, dir / "one.trace.h5", dir / "plan.jsonl");
}
