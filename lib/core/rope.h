// Rotary position embedding: facts and mathematics, shared by codecs, attention and models.
// Layout everywhere inside vqkv is "half": pair p of a head is channels (p, p + d/2), as in Hugging Face's Llama.
// Pair p of a key at position t is rotated by the angle t * inverse_frequency[p]:
//   x' = x cos - y sin, y' = x sin + y cos.
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
  double attention_factor = 1.0;          // multiplies cos and sin (1 for every family supported today)
  std::string scaling = "none";           // "none" | "llama3" | "linear" | "factors": how inverse_frequency was made
  std::vector<double> inverse_frequency;  // (rotary_dim / 2), scaling applied

  // theta^(-2p/rotary_dim) with no scaling.
  static RopeFacts plain(int head_dim, int rotary_dim, double theta);
  // The frequency bands of Llama 3.1 (evaluation.md 8.4).
  void apply_llama3(double factor, double low_freq_factor, double high_freq_factor, double original_context);
  void apply_linear(double factor);
  // Divides inverse_frequency[p] by factors[p] (the rope_freqs tensor of a GGUF).
  void apply_factors(const std::vector<float>& factors);

  Json to_json() const;
  static RopeFacts from_json(const Json& j);
};

// cos and sin for positions [0, n), grown on demand and shared; angles are computed in double and rounded once.
class RopeTable {
 public:
  explicit RopeTable(RopeFacts facts);
  ~RopeTable();
  const RopeFacts& facts() const { return facts_; }
  // Rows for a position: (rotary_dim/2) cos, then (rotary_dim/2) sin. Thread-safe.
  const float* row(int64_t position) const;

 private:
  RopeFacts facts_;
  struct Blocks;
  std::unique_ptr<Blocks> blocks_;
};

// Rotates rows of x in place. x is (n, heads * head_dim); positions has n entries. inverse rotates back.
void rope_apply(const RopeTable& table, const int32_t* positions, MutMatrix x, bool inverse = false);

}  // namespace vqkv
