// Facts of a row of logits: what replay compares, vectorised because a vocabulary row costs as much as a layer.
#pragma once
#include <cstdint>

namespace vqkv {

struct LogitFacts {
  double nll = 0;      // -ln p(truth), nats
  double log_sum = 0;  // ln sum exp(logits)
  int32_t top = 0;     // arg-max, lowest index on ties
};
LogitFacts logit_facts(const float* logits, int64_t vocab, int32_t truth);

// KL(base || test) over every entry, no cut-off, nats; the log sums are those of logit_facts. Differences of
// log-probabilities are formed in float after the maxima are taken out; sums are in double.
double kl_divergence(const float* base, double base_log_sum, const float* test, double test_log_sum, int64_t vocab);

}  // namespace vqkv
