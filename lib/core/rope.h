// Rotary position embedding: facts and mathematics, shared by codecs, attention and models.
// Layout everywhere inside vqkv is "half": pair p of a head is channels (p, p + d/2), as in Hugging Face's Llama.
// Pair p of a key at position t is rotated by the angle t * inverse_frequency[p]:
//   x' = a (x cos - y sin), y' = a (x sin + y cos)
// with the attention factor a, 1 in all but YaRN: it multiplies queries and keys, so scores carry its square.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/json_fwd.h"
#include "core/view.h"

namespace vqkv {

struct RopeFacts {
  int head_dim = 0;
  int rotary_dim = 0;  // channels [0, rotary_dim) rotate; the rest pass through
  double theta = 10000.0;
  double attention_factor = 1.0;          // multiplies cos and sin; above 0
  std::string scaling = "none";           // how inverse_frequency was made: none, linear, llama3, yarn or factors
  std::vector<double> inverse_frequency;  // (rotary_dim / 2), scaling applied

  // theta^(-2p/rotary_dim) with no scaling.
  static RopeFacts plain(int head_dim, int rotary_dim, double theta);
  // The frequency bands of Llama 3.1 (evaluation.md 8.4).
  void apply_llama3(double factor, double low_freq_factor, double high_freq_factor, double original_context);
  void apply_linear(double factor);
  // YaRN (arXiv 2309.00071, as transformers and llama.cpp compute it): pairs that turn beta_fast times or more within
  // the original context keep their frequency, those that turn beta_slow times or less are divided by factor, with a
  // linear ramp between; `truncate` moves the ramp's ends outwards to whole pairs. Sets attention_factor to
  // yarn_scale(factor). theta above 1.
  struct Yarn {
    double factor = 1, original_context = 0, beta_fast = 32, beta_slow = 1;
    bool truncate = true;
  };
  void apply_yarn(const Yarn& yarn);
  // 0.1 multiplier ln(factor) + 1, and 1 up to a factor of 1.
  static double yarn_scale(double factor, double multiplier = 1);
  // Divides inverse_frequency[p] by factors[p] (the rope_freqs tensor of a GGUF).
  void apply_factors(const std::vector<float>& factors);

  Json to_json() const;
  static RopeFacts from_json(const Json& j);
};

// cos and sin for positions [0, n), grown on demand and shared; angles are computed in double and rounded once. Rows
// are made 1,024 positions at a time, under a lock, and found without one.
class RopeTable {
 public:
  explicit RopeTable(RopeFacts facts);
  ~RopeTable();
  const RopeFacts& facts() const { return facts_; }
  // Rows for a position: (rotary_dim/2) cos, then (rotary_dim/2) sin. Thread-safe.
  const float* row(int64_t position) const;

 private:
  const float* make(size_t block) const;
  RopeFacts facts_;
  struct Blocks;
  std::unique_ptr<Blocks> blocks_;
};

// Rotates rows of x in place. x is (n, heads * head_dim); positions has n entries. inverse undoes it, the attention
// factor included.
void rope_apply(const RopeTable& table, const int32_t* positions, MutMatrix x, bool inverse = false);
// Gradients with respect to rotated rows become those with respect to the rows before: the transposed map, which is the
// inverse times the attention factor's square.
void rope_transpose(const RopeTable& table, const int32_t* positions, MutMatrix x);

}  // namespace vqkv
