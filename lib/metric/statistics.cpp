#include "metric/statistics.h"

#include <algorithm>
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

double quantile(std::span<const double> x, double q) { return quantiles(x, std::span(&q, 1))[0]; }

std::vector<double> quantiles(std::span<const double> x, std::span<const double> q) {
  std::vector<double> sorted(x.begin(), x.end());
  std::sort(sorted.begin(), sorted.end());
  std::vector<double> out;
  for (const double v : q) out.push_back(sorted_quantile(sorted, v));
  return out;
}

Interval cluster_bootstrap(std::span<const double> x, std::span<const int32_t> cluster, Rng rng, int resamples,
                           double level) {
  const auto clusters = clusters_of(x, cluster);
  if (clusters.size() < 2) return {kNaN, kNaN};
  std::vector<double> means;
  for (int r = 0; r < resamples; ++r) {
    double sum = 0, count = 0;
    for (size_t i = 0; i < clusters.size(); ++i) {
      const auto& c = clusters[rng.below(clusters.size())];
      sum += c.sum;
      count += c.count;
    }
    means.push_back(sum / count);
  }
  std::sort(means.begin(), means.end());
  return {sorted_quantile(means, 0.5 * (1 - level)), sorted_quantile(means, 0.5 * (1 + level))};
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
