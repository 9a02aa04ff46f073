// Statistics behind every reported number: means with errors, quantiles, exact tests over clusters, rank correlation.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "core/rng.h"

namespace vqkv {

struct MeanError {
  double mean = 0;
  double error = 0;  // standard error of the mean; 0 when n < 2
  int64_t n = 0;
};
// sqrt((E[x^2] - E[x]^2) / (n - 1)), in double, in order.
MeanError mean_error(std::span<const double> x);

// Linear interpolation between order statistics, q in [0, 1]. Sorts a copy.
double quantile(std::span<const double> x, double q);
// x[i] / y[i] of the rounds that both have: measured side by side, drift cancels.
std::vector<double> paired_ratios(std::span<const double> x, std::span<const double> y);
std::vector<double> quantiles(std::span<const double> x, std::span<const double> q);

struct Interval {
  double low = 0, high = 0;
};

// Positions inside one text are correlated, so what counts is clusters (documents or windows): x and cluster have one
// entry a position. Under the null the sum of every cluster is as likely negative as positive; `p` is the two-sided
// share of the 2^k sign assignments whose total is at least as far from zero as the one seen. Exact for symmetric
// differences at any k, so never below 2^(1-k). Beyond 16 clusters, or more where `level` asks for it, signs are drawn.
// `interval` holds the centres that the test at `level` does not refuse: between two of the 2^k - 1 means of subsets of
// clusters (Hartigan, Using subsample values as typical values, JASA 1969).
struct SignFlip {
  int64_t clusters = 0;
  double p = 1;
  Interval interval;  // NaN where k clusters can't reach the level
};
SignFlip sign_flip(std::span<const double> x, std::span<const int32_t> cluster, Rng rng, double level = 0.05,
                   double interval_level = 0.05);
// The least number of clusters with which a sign-flip test can reach `level` in (0, 1].
int64_t clusters_to_reach(double level);
// Holm's adjusted p-values, in the order given: refusing those at or below a level keeps the chance of any false
// refusal at or below it.
std::vector<double> holm(std::span<const double> p);

// Standard error of the mean from cluster means, weighted by cluster size (NaN with fewer than two clusters).
double cluster_error(std::span<const double> x, std::span<const int32_t> cluster);

// Spearman's rank correlation with average ranks for ties; NaN when undefined.
double spearman(std::span<const double> a, std::span<const double> b);
double pearson(std::span<const double> a, std::span<const double> b);

}  // namespace vqkv
