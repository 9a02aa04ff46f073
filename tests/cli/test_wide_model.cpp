// A random model with wide rows, where products are summed in several pieces: codes, codec files and measurements don't
// depend on threads, shards or interruptions.
#include "core/rng.h"
#include "io/atomic_file.h"
#include "support/model_writers.h"
#include "support/sweep_sameness.h"
#include "support/sweep_trace.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

constexpr int kLayers = 2, kHidden = 96, kFfn = 4992, kQ = 4, kKv = 2, kDim = 32, kVocab = 64;  // rows of w_down: 4,992

// Weights of a size that keeps activations near one.
std::vector<float> weights(int64_t rows, int64_t cols, uint64_t seed) {
  Rng rng(seed);
  std::vector<float> w(static_cast<size_t>(rows * cols));
  for (float& v : w) v = static_cast<float>(rng.normal() / std::sqrt(static_cast<double>(cols)));
  return w;
}

void write_wide_model(const std::string& path) {
  testing::GgufBuilder b;
  b.text("general.architecture", "qwen2").text("general.name", "wide");
  b.u32("qwen2.block_count", kLayers).u32("qwen2.embedding_length", kHidden).u32("qwen2.feed_forward_length", kFfn);
  b.u32("qwen2.attention.head_count", kQ).u32("qwen2.attention.head_count_kv", kKv).u32("qwen2.context_length", 512);
  b.u32("qwen2.attention.key_length", kDim).u32("qwen2.attention.value_length", kDim);
  b.f32("qwen2.attention.layer_norm_rms_epsilon", 1e-6f).f32("qwen2.rope.freq_base", 10000);
  b.text("tokenizer.ggml.model", "gpt2").text("tokenizer.ggml.pre", "gpt-2");
  const auto array = [](uint32_t type, const std::vector<std::string>& items) {
    std::string out = testing::raw(type) + testing::raw(uint64_t{items.size()});
    for (const std::string& item : items) out += item;
    return out;
  };
  std::vector<std::string> tokens, types;
  for (int i = 0; i < kVocab; ++i) {
    tokens.push_back(testing::gguf_text(i + 1 < kVocab ? std::string(1, static_cast<char>('0' + i)) : "01"));
    types.push_back(testing::raw(int32_t{1}));
  }
  b.values.push_back({"tokenizer.ggml.tokens", array(8, tokens), 9});
  b.values.push_back({"tokenizer.ggml.token_type", array(5, types), 9});
  b.values.push_back({"tokenizer.ggml.merges", array(8, {testing::gguf_text("0 1")}), 9});
  uint64_t seed = 1;
  const auto matrix = [&](const std::string& name, int rows, int cols) {
    b.tensor(name, {rows, cols}, weights(rows, cols, seed++));
  };
  const auto vector = [&](const std::string& name, int n, float value) {
    b.tensor(name, {n}, std::vector<float>(static_cast<size_t>(n), value));
  };
  matrix("token_embd.weight", kVocab, kHidden);
  vector("output_norm.weight", kHidden, 1);
  for (int l = 0; l < kLayers; ++l) {
    const std::string at = fmt::format("blk.{}.", l);
    vector(at + "attn_norm.weight", kHidden, 1);
    vector(at + "ffn_norm.weight", kHidden, 1);
    for (const auto& [name, heads] : {std::pair("attn_q", kQ), std::pair("attn_k", kKv), std::pair("attn_v", kKv)}) {
      matrix(at + name + ".weight", heads * kDim, kHidden);
      vector(at + name + ".bias", heads * kDim, 0.25f);
    }
    matrix(at + "attn_output.weight", kHidden, kQ * kDim);
    matrix(at + "ffn_gate.weight", kFfn, kHidden);
    matrix(at + "ffn_up.weight", kFfn, kHidden);
    matrix(at + "ffn_down.weight", kHidden, kFfn);
  }
  write_file(path, b.build());
}

}  // namespace

TEST_CASE("rows of 4992: the same at any thread count, in shards, and after kill -9", "[cli][sweep][dump]") {
  const TestFolder dir;
  const std::string folder = dir.path.string();
  write_wide_model(dir / "wide.gguf");
  std::vector<std::string> input{"--model", dir / "wide.gguf", "--context", "192", "--query-stride",
                                 "8",       "--token-ids"};
  for (uint64_t d = 0; d < 3; ++d) {
    Rng rng(100 + d);
    std::string ids;
    for (int t = 0; t < 192; ++t) ids += fmt::format("{} ", rng.below(kVocab));
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
