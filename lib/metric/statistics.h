// Statistics behind every reported number: means with errors, quantiles, paired cluster bootstrap, rank correlation.
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
std::vector<double> quantiles(std::span<const double> x, std::span<const double> q);

struct Interval {
  double low = 0, high = 0;
};

// Positions inside one text are correlated, so resampling is over clusters (windows or documents).
// x and cluster have one entry a position; the statistic is the mean over all positions of the resampled clusters.
// 95 % percentile interval. With fewer than two clusters the interval is unknown: low = high = NaN.
Interval cluster_bootstrap(std::span<const double> x, std::span<const int32_t> cluster, Rng rng, int resamples = 2000,
                           double level = 0.95);
// Standard error of the mean from cluster means, weighted by cluster size (NaN with fewer than two clusters).
double cluster_error(std::span<const double> x, std::span<const int32_t> cluster);

// Spearman's rank correlation with average ranks for ties; NaN when undefined.
double spearman(std::span<const double> a, std::span<const double> b);
double pearson(std::span<const double> a, std::span<const double> b);

}  // namespace vqkv
