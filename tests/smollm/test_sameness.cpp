// All of SmolLM2 through vqkv-dump and vqkv-sweep: nothing but times depends on threads, shards or interruptions.
#include "io/atomic_file.h"
#include "support/sweep_sameness.h"
#include "support/sweep_trace.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

// Directions that hold 90 % of the energy, the median head's: keys look low-rank for their mean alone, values don't.
void check_ranks(const Json& inspected) {
  const auto median = [&](const std::string& rows, const char* column) {
    std::vector<int> ranks;
    for (const Json& head : inspected.at("heads"))
      if (head.at("rows") == rows) ranks.push_back(head.at(column));
    REQUIRE(ranks.size() == 90);
    std::nth_element(ranks.begin(), ranks.begin() + 45, ranks.end());
    return ranks[45];
  };
  CHECK(median("k pre-RoPE", "rank90") <= 8);
  CHECK(median("k pre-RoPE", "rank90_centred") >= 26);
  CHECK(median("v", "rank90_centred") - median("v", "rank90") <= 3);
}

}  // namespace

TEST_CASE("SmolLM2: traces and sweeps are the same at any thread count, in shards, and after kill -9") {
  const TestFolder dir;
  const std::string folder = dir.path.string();
  const auto capture = [&](const std::string& name, int threads) {
    return capture_hash(
        folder, dir / name, threads,
        {"--model", VQKV_SOURCE_DIR "/data/models/SmolLM2-135M-Instruct.Q4_1.gguf", "--text",
         VQKV_SOURCE_DIR "/data/jargon-0.txt", VQKV_SOURCE_DIR "/data/kjv-0.txt", VQKV_SOURCE_DIR "/data/jargon-1.txt",
         "--max-tokens", "128", "--context", "128", "--query-stride", "16"});
  };
  CHECK(capture("one.trace.h5", 1) == capture("two.trace.h5", 2));
  check_ranks(Json::parse(succeed("vqkv-dump", folder, {"inspect", dir / "one.trace.h5", "--json", "-q"}).out));
  write_file(
      dir / "s.yaml",
      fmt::format(
          "trace: {{path: {}, train: [0], select: [1], report: [2]}}\n"
          "cache: {{sinks: 4, window: 32, flush: 32}}\ncontexts: [4096]\n"
          "sweep:\n  grid:\n    codec:\n"
          "      - {{name: kivi, bits: 2}}\n"
          "      - {{name: pq, codebooks: 16, bits: 5, iterations: 8, k: {{transform: [center, query_metric]}}}}\n"
          "      - {{name: rvq, codebooks: 6, bits: 6, beam: 4, refine: 1, iterations: 8, k: {{rope: pre}}}}\n"
          "      - {{name: simvq, share: heads, codebooks: 4, bits: 6, rounds: 4}}\n"
          "      - {{name: kumar, codebooks: 4, bits: 6, group: 32}}\n",
          dir / "one.trace.h5"));
  succeed("vqkv-sweep", folder, {"plan", dir / "s.yaml", "-o", dir / "plan.jsonl", "-q"});
  check_sweep_sameness(folder, dir / "one.trace.h5", dir / "plan.jsonl");
}
