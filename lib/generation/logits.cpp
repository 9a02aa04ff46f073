#include "generation/logits.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "core/finite.h"
#include "core/rows.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "generation/logits.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <hwy/contrib/math/math-inl.h>

HWY_BEFORE_NAMESPACE();
namespace vqkv {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

constexpr int64_t kChunk = 1024;  // float sums over a chunk, double over chunks: 1e-7 relative at any vocabulary

double SumExp(const float* x, int64_t n, float shift) {
  const hn::ScalableTag<float> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto s = hn::Set(d, shift);
  double total = 0;
  for (int64_t first = 0; first < n; first += kChunk) {
    const int64_t end = std::min(n, first + kChunk);
    auto sum = hn::Zero(d);
    int64_t i = first;
    for (; i + lanes <= end; i += lanes) sum = hn::Add(sum, hn::Exp(d, hn::Sub(hn::LoadU(d, x + i), s)));
    total += static_cast<double>(hn::GetLane(hn::SumOfLanes(d, sum)));
    for (; i < end; ++i) total += static_cast<double>(std::exp(x[i] - shift));
  }
  return total;
}

// sum over v of exp(base - base_lse) * ((base - base_lse) - (test - test_lse)), with the two constants split off so
// that the float differences stay small.
double KlSum(const float* base, float base_lse, const float* test, float offset, int64_t n) {
  const hn::ScalableTag<float> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto shift = hn::Set(d, base_lse), gap = hn::Set(d, offset);
  double total = 0;
  for (int64_t first = 0; first < n; first += kChunk) {
    const int64_t end = std::min(n, first + kChunk);
    auto sum = hn::Zero(d);
    int64_t i = first;
    for (; i + lanes <= end; i += lanes) {
      const auto b = hn::LoadU(d, base + i);
      const auto difference = hn::Sub(hn::Sub(b, hn::LoadU(d, test + i)), gap);
      sum = hn::MulAdd(hn::Exp(d, hn::Sub(b, shift)), difference, sum);
    }
    total += static_cast<double>(hn::GetLane(hn::SumOfLanes(d, sum)));
    for (; i < end; ++i) total += static_cast<double>(std::exp(base[i] - base_lse) * (base[i] - test[i] - offset));
  }
  return total;
}

}  // namespace HWY_NAMESPACE
}  // namespace vqkv
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace vqkv {
HWY_EXPORT(SumExp);
HWY_EXPORT(KlSum);

LogitFacts logit_facts(const float* logits, int64_t vocab, int32_t truth) {
  // The vector loops take a NaN for a probability of zero.
  if (const int64_t bad = first_not_finite(logits, vocab); bad >= 0)
    fail_data(fmt::format("the logit of token {} is {}; logits must be finite", bad, logits[bad]));
  LogitFacts f;
  const float best = largest(logits, vocab);
  f.top = static_cast<int32_t>(std::find(logits, logits + vocab, best) - logits);
  f.log_sum = static_cast<double>(best) + std::log(HWY_DYNAMIC_DISPATCH(SumExp)(logits, vocab, best));
  f.nll = f.log_sum - static_cast<double>(logits[truth]);
  return f;
}

double kl_divergence(const float* base, double base_log_sum, const float* test, double test_log_sum, int64_t vocab) {
  // The float constants are what the loop used; their rounding is put back in double (the weights sum to 1).
  const double gap = base_log_sum - test_log_sum;
  const float gap_f = static_cast<float>(gap), lse_f = static_cast<float>(base_log_sum);
  const double scale = std::exp(static_cast<double>(lse_f) - base_log_sum);
  const double sum = HWY_DYNAMIC_DISPATCH(KlSum)(base, lse_f, test, gap_f, vocab) * scale;
  return std::max(sum - (gap - static_cast<double>(gap_f)), 0.0);  // in this order a NaN stays one
}

}  // namespace vqkv
#endif
