#include "generation/sampler.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/error.h"
#include "core/finite.h"

namespace vqkv {

int32_t most_likely(std::span<const float> logits) {
  return static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

Sampler::Sampler(const SamplingOptions& options) : options_(options), rng_(options.seed) {
  if (!(options.temperature >= 0) || !std::isfinite(options.temperature))
    fail_usage(fmt::format("temperature is {}; allowed: 0 (greedy) or more", options.temperature));
  if (options.top_k < 0) fail_usage(fmt::format("top_k is {}; allowed: 0 (all) or more", options.top_k));
  if (!(options.top_p > 0 && options.top_p <= 1))
    fail_usage(fmt::format("top_p is {}; allowed: above 0, up to 1", options.top_p));
}

int32_t Sampler::next(std::span<const float> logits) {
  VQKV_CHECK(!logits.empty());
  if (const int64_t bad = first_not_finite(logits.data(), static_cast<int64_t>(logits.size())); bad >= 0)
    fail_data(fmt::format("the logit of token {} is {}: the model or its cache is broken", bad,
                          logits[static_cast<size_t>(bad)]));
  if (options_.temperature == 0) return most_likely(logits);

  const auto likelier = [&](int32_t a, int32_t b) {
    const float x = logits[static_cast<size_t>(a)], y = logits[static_cast<size_t>(b)];
    return x > y || (x == y && a < b);
  };
  order_.resize(logits.size());
  std::iota(order_.begin(), order_.end(), 0);
  size_t kept = options_.top_k > 0 ? std::min(logits.size(), static_cast<size_t>(options_.top_k)) : logits.size();
  std::partial_sort(order_.begin(), order_.begin() + static_cast<std::ptrdiff_t>(kept), order_.end(), likelier);

  probability_.resize(kept);
  const double most = logits[static_cast<size_t>(order_[0])];
  double total = 0;
  for (size_t i = 0; i < kept; ++i) {
    probability_[i] =
        std::exp((static_cast<double>(logits[static_cast<size_t>(order_[i])]) - most) / options_.temperature);
    total += probability_[i];
  }
  if (options_.top_p < 1) {
    double sum = 0;
    size_t i = 0;
    while (i < kept && sum < options_.top_p * total) sum += probability_[i++];
    kept = std::max<size_t>(i, 1);
    total = sum;
  }
  const double target = rng_.uniform() * total;
  double sum = 0;
  for (size_t i = 0; i < kept; ++i) {
    sum += probability_[i];
    if (target < sum) return order_[i];
  }
  return order_[kept - 1];  // uniform() * total can reach the sum by rounding
}

}  // namespace vqkv
