#include "metric/statistics.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>

#include "core/error.h"

namespace vqkv {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

struct Cluster {
  double sum = 0;
  double count = 0;
};

std::vector<Cluster> clusters_of(std::span<const double> x, std::span<const int32_t> cluster) {
  VQKV_CHECK(x.size() == cluster.size());
  std::map<int32_t, Cluster> by_id;
  for (size_t i = 0; i < x.size(); ++i) {
    auto& c = by_id[cluster[i]];
    c.sum += x[i];
    c.count += 1;
  }
  std::vector<Cluster> out;
  for (const auto& [id, c] : by_id) out.push_back(c);
  return out;
}

double sorted_quantile(const std::vector<double>& sorted, double q) {
  if (sorted.empty()) return kNaN;
  const double at = q * static_cast<double>(sorted.size() - 1);
  const size_t low = static_cast<size_t>(at);
  const size_t high = std::min(low + 1, sorted.size() - 1);
  return sorted[low] + (at - static_cast<double>(low)) * (sorted[high] - sorted[low]);
}

std::vector<double> ranks(std::span<const double> x) {
  std::vector<size_t> order(x.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return x[a] < x[b]; });
  std::vector<double> r(x.size());
  for (size_t i = 0; i < order.size();) {
    size_t j = i;
    while (j < order.size() && x[order[j]] == x[order[i]]) ++j;
    for (size_t k = i; k < j; ++k) r[order[k]] = 0.5 * static_cast<double>(i + j - 1);
    i = j;
  }
  return r;
}

}  // namespace

MeanError mean_error(std::span<const double> x) {
  MeanError m;
  m.n = static_cast<int64_t>(x.size());
  if (x.empty()) return m;
  for (const double v : x) m.mean += v;
  m.mean /= static_cast<double>(x.size());
  if (x.size() < 2) return m;
  double variance = 0;
  for (const double v : x) variance += (v - m.mean) * (v - m.mean);
  m.error = std::sqrt(variance / static_cast<double>(x.size()) / static_cast<double>(x.size() - 1));
  return m;
}

std::vector<double> paired_ratios(std::span<const double> x, std::span<const double> y) {
  std::vector<double> out;
  for (size_t i = 0; i < std::min(x.size(), y.size()); ++i) out.push_back(x[i] / y[i]);
  return out;
}

double quantile(std::span<const double> x, double q) { return quantiles(x, std::span(&q, 1))[0]; }

std::vector<double> quantiles(std::span<const double> x, std::span<const double> q) {
  std::vector<double> sorted(x.begin(), x.end());
  std::sort(sorted.begin(), sorted.end());
  std::vector<double> out;
  for (const double v : q) out.push_back(sorted_quantile(sorted, v));
  return out;
}

int64_t clusters_to_reach(double level) {
  VQKV_CHECK(level > 0 && level <= 1);
  int64_t k = 1;
  while (std::ldexp(2.0, static_cast<int>(-k)) > level) ++k;
  return k;
}

SignFlip sign_flip(std::span<const double> x, std::span<const int32_t> cluster, Rng rng, double level,
                   double interval_level) {
  constexpr int64_t kAlwaysExact = 16;
  const auto clusters = clusters_of(x, cluster);
  SignFlip out{static_cast<int64_t>(clusters.size()), 1, {kNaN, kNaN}};
  if (clusters.empty()) return out;
  // Flipping a subset turns the total T into T - 2 * (sum of the subset): it comes to T or above where that sum is zero
  // or below. The empty subset always does.
  const int64_t bits = std::min(out.clusters, std::max(kAlwaysExact, clusters_to_reach(level) + 2));
  const double draws = std::ldexp(1.0, static_cast<int>(bits));
  std::vector<Cluster> subset(size_t{1} << bits);
  if (bits == out.clusters) {
    for (size_t s = 1; s < subset.size(); ++s) {
      const Cluster &rest = subset[s & (s - 1)], &own = clusters[static_cast<size_t>(std::countr_zero(s))];
      subset[s] = {rest.sum + own.sum, rest.count + own.count};
    }
  } else {
    for (size_t s = 1; s < subset.size(); ++s)
      for (const Cluster& c : clusters)
        if (rng.below(2)) subset[s] = {subset[s].sum + c.sum, subset[s].count + c.count};
  }
  double scale = 0;
  for (const Cluster& c : clusters) scale += std::fabs(c.sum);
  const double tie = 1e-12 * scale;  // sums of different order that are zero on paper
  int64_t low = 0, high = 0;
  std::vector<double> means;
  for (const Cluster& s : subset) {
    low += s.sum <= tie;
    high += s.sum >= -tie;
    if (s.count > 0) means.push_back(s.sum / s.count);
  }
  out.p = std::min(1.0, 2 * static_cast<double>(std::min(low, high)) / draws);

  // A centre below the r-th least mean is refused: fewer than r means and the empty subsets lie at or under it.
  const int64_t empty = static_cast<int64_t>(subset.size() - means.size());
  const int64_t r = static_cast<int64_t>(interval_level / 2 * draws) + 1 - empty;
  if (r < 1 || 2 * r > static_cast<int64_t>(means.size()) + 1) return out;
  std::nth_element(means.begin(), means.begin() + (r - 1), means.end());
  out.interval.low = means[static_cast<size_t>(r - 1)];
  std::nth_element(means.begin(), means.end() - r, means.end());
  out.interval.high = means[means.size() - static_cast<size_t>(r)];
  return out;
}

std::vector<double> holm(std::span<const double> p) {
  std::vector<size_t> order(p.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return p[a] < p[b]; });
  std::vector<double> out(p.size());
  double least = 0;
  for (size_t i = 0; i < order.size(); ++i) {
    least = std::max(least, std::min(1.0, static_cast<double>(p.size() - i) * p[order[i]]));
    out[order[i]] = least;
  }
  return out;
}

double cluster_error(std::span<const double> x, std::span<const int32_t> cluster) {
  const auto clusters = clusters_of(x, cluster);
  const double k = static_cast<double>(clusters.size());
  if (clusters.size() < 2) return kNaN;
  double sum = 0, count = 0;
  for (const auto& c : clusters) {
    sum += c.sum;
    count += c.count;
  }
  const double mean = sum / count;
  double variance = 0;
  for (const auto& c : clusters) {
    const double residual = c.sum - c.count * mean;
    variance += residual * residual;
  }
  return std::sqrt(variance * k / (k - 1)) / count;
}

double pearson(std::span<const double> a, std::span<const double> b) {
  VQKV_CHECK(a.size() == b.size());
  if (a.size() < 2) return kNaN;
  const double ma = mean_error(a).mean, mb = mean_error(b).mean;
  double saa = 0, sbb = 0, sab = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    saa += (a[i] - ma) * (a[i] - ma);
    sbb += (b[i] - mb) * (b[i] - mb);
    sab += (a[i] - ma) * (b[i] - mb);
  }
  return saa > 0 && sbb > 0 ? sab / std::sqrt(saa * sbb) : kNaN;
}

double spearman(std::span<const double> a, std::span<const double> b) {
  const auto ra = ranks(a), rb = ranks(b);
  return pearson(ra, rb);
}

}  // namespace vqkv
