// How the next token is drawn from a row of logits.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "core/rng.h"

namespace vqkv {

struct SamplingOptions {
  double temperature = 0;  // 0: greedy, the rest is then ignored
  int64_t top_k = 0;       // keep the k most likely tokens; 0: all
  double top_p = 1;        // then the fewest whose probabilities, most likely first, sum to at least top_p
  uint64_t seed = 1;
};

// The id of the largest logit; equal ones: the lower.
int32_t most_likely(std::span<const float> logits);

// Temperature, then top-k, then top-p, as Hugging Face orders them. Equal logits: the lower id first.
class Sampler {
 public:
  explicit Sampler(const SamplingOptions& options);  // kUsage names the option that is out of range
  int32_t next(std::span<const float> logits);       // kBadData when a logit is NaN

 private:
  SamplingOptions options_;
  Rng rng_;
  std::vector<int32_t> order_;
  std::vector<double> probability_;
};

}  // namespace vqkv
