#include "model/backward.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "core/rng.h"
#include "model/kernels_cpu.h"
#include "model/rows.h"
#include "model/runtime.h"

namespace vqkv {
namespace {

// Calls loss(row, logits of the row) for every row, side by side, and adds up what comes back in order.
template <class Loss>
double sum_rows(MutMatrix logits, Loss&& loss) {
  std::vector<double> parts(static_cast<size_t>(logits.rows), 0.0);
  for_rows(logits.rows, [&](int64_t r) { parts[static_cast<size_t>(r)] = loss(r, logits.row(r)); });
  double sum = 0;
  for (const double p : parts) sum += p;
  return sum;
}

// Exponentials (n) of a row and their sum become probabilities, less 1 at the label: the gradient of -log p(label).
void to_gradient(float* x, int64_t n, double sum, int32_t label) {
  const auto inverse = static_cast<float>(1 / sum);
  for (int64_t i = 0; i < n; ++i) x[i] *= inverse;
  x[label] -= 1;
}

}  // namespace

NllLoss NllLoss::next_tokens(std::span<const int32_t> tokens) {
  std::vector<int32_t> labels(tokens.begin() + (tokens.empty() ? 0 : 1), tokens.end());
  labels.resize(tokens.size(), kNoLabel);
  return NllLoss(std::move(labels));
}

void NllLoss::require(int64_t tokens, int64_t vocab) const {
  if (static_cast<int64_t>(labels_.size()) != tokens)
    fail_usage(fmt::format("{} labels for a window of {} tokens", labels_.size(), tokens));
  for (size_t t = 0; t < labels_.size(); ++t)
    if (labels_[t] < kNoLabel || labels_[t] >= vocab)
      fail_usage(fmt::format("the label of position {} is {}; allowed: 0 to {}, or {} for none", t, labels_[t],
                             vocab - 1, kNoLabel));
}

double NllLoss::differentiate(int64_t first, MutMatrix logits) {
  return sum_rows(logits, [&](int64_t r, float* x) {
    const int32_t label = labels_[static_cast<size_t>(first + r)];
    if (label == kNoLabel) {
      std::fill_n(x, logits.cols, 0.0f);
      return 0.0;
    }
    const double own = x[label];  // its exponential may be zero
    const auto [max, sum] = exp_row(x, logits.cols);
    to_gradient(x, logits.cols, sum, label);
    return std::log(sum) + double{max} - own;
  });
}

void SampledNllLoss::require(int64_t tokens, int64_t) const {
  if (tokens != tokens_) fail_usage(fmt::format("labels for {} tokens, and a window of {}", tokens_, tokens));
}

double SampledNllLoss::differentiate(int64_t first, MutMatrix logits) {
  return sum_rows(logits, [&](int64_t r, float* x) {
    const int64_t n = logits.cols, position = first + r;
    if (position + 1 == tokens_) {
      std::fill_n(x, n, 0.0f);
      return 0.0;
    }
    const double sum = exp_row(x, n).sum;
    double left = Rng(seed_).split(static_cast<uint64_t>(position)).uniform() * sum;
    int32_t label = 0;  // of those with a probability the last, where rounding leaves something over
    for (int32_t i = 0; i < n && left >= 0; ++i) {
      if (!(x[i] > 0)) continue;
      label = i;
      left -= double{x[i]};
    }
    const double loss = std::log(sum) - std::log(double{x[label]});
    to_gradient(x, n, sum, label);
    return loss;
  });
}

void KldLoss::require(int64_t tokens, int64_t vocab) const {
  if (first_position_ < 0 || first_position_ + log_p_.rows > tokens || log_p_.cols != vocab)
    fail_usage(
        fmt::format("targets of {} positions from {} on over {} tokens, for a window of {} and a vocabulary of {}",
                    log_p_.rows, first_position_, log_p_.cols, tokens, vocab));
}

double KldLoss::differentiate(int64_t first, MutMatrix logits) {
  return sum_rows(logits, [&](int64_t r, float* x) {
    const int64_t n = logits.cols, row = first + r - first_position_;
    if (row < 0 || row >= log_p_.rows) {
      std::fill_n(x, n, 0.0f);
      return 0.0;
    }
    const float* target = log_p_.row(row);
    double cross = 0, entropy = 0, mass = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double p = std::exp(double{target[i]});
      if (!(p > 0)) continue;
      mass += p;
      entropy += p * double{target[i]};
      cross += p * double{x[i]};
    }
    const auto [max, sum] = exp_row(x, n);
    const auto inverse = static_cast<float>(1 / sum);
    for (int64_t i = 0; i < n; ++i) x[i] = x[i] * inverse - std::exp(target[i]);
    return entropy - cross + mass * (double{max} + std::log(sum));
  });
}

}  // namespace vqkv
