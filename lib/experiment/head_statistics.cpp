#include "experiment/head_statistics.h"

#include <algorithm>
#include <cmath>

#include "codec/transform/symmetric.h"
#include "core/json.h"

namespace vqkv {
namespace {

constexpr double kEnergy = 0.9;  // of a head's rows, that the directions of its rank hold

// Directions that hold kEnergy of the energy in `moment` (n, n), the mean outer product of rows.
int energy_rank(const std::vector<double>& moment, int n) {
  const SymmetricEigen e = symmetric_eigen(moment, n);
  double total = 0, held = 0;
  for (const double v : e.values) total += std::max(v, 0.0);
  int rank = 0;
  while (rank < n && held < kEnergy * total) held += std::max(e.values[static_cast<size_t>(rank++)], 0.0);
  return rank;
}

}  // namespace

HeadStatistics::HeadStatistics(int64_t channels)
    : sum_(static_cast<size_t>(channels)), top_(sum_), moment_(sum_.size() * sum_.size()) {}

void HeadStatistics::first_pass(ConstMatrix x) {
  rows_ += x.rows;
  for (int64_t r = 0; r < x.rows; ++r) {
    double norm = 0;
    for (int64_t c = 0; c < x.cols; ++c) {
      const double v = static_cast<double>(x(r, c));
      sum_[static_cast<size_t>(c)] += v;
      double* moment = moment_.data() + static_cast<size_t>(c) * sum_.size();
      for (int64_t b = 0; b <= c; ++b) moment[b] += v * static_cast<double>(x(r, b));
      top_[static_cast<size_t>(c)] = std::max(top_[static_cast<size_t>(c)], std::fabs(v));
      norm += v * v;
    }
    norm_ += std::sqrt(norm);
    norm2_ += norm;
  }
}

void HeadStatistics::second_pass(ConstMatrix x) {
  const double n = static_cast<double>(rows_);
  for (int64_t r = 0; r < x.rows; ++r)
    for (int64_t c = 0; c < x.cols; ++c) {
      const double v = static_cast<double>(x(r, c)) - sum_[static_cast<size_t>(c)] / n;
      centred2_ += v * v;
      centred4_ += v * v * v * v;
    }
}

Json HeadStatistics::to_json() const {
  const double n = static_cast<double>(rows_), values = n * static_cast<double>(sum_.size());
  const size_t d = sum_.size();
  std::vector<double> rms, moment = moment_, centred(moment.size());
  double mean2 = 0, all2 = 0;
  for (size_t c = 0; c < d; ++c) {
    rms.push_back(std::sqrt(moment_[c * d + c] / n));
    mean2 += sum_[c] / n * sum_[c] / n;
    all2 += moment_[c * d + c] / n;
    for (size_t b = 0; b <= c; ++b) {
      moment[b * d + c] = moment[c * d + b] /= n;
      centred[b * d + c] = centred[c * d + b] = moment[c * d + b] - sum_[b] / n * sum_[c] / n;
    }
  }
  std::vector<double> sorted = rms;
  std::sort(sorted.begin(), sorted.end());
  const double median = sorted[sorted.size() / 2];
  Json outliers = Json::array();
  size_t worst = 0;
  for (size_t c = 0; c < rms.size(); ++c) {
    if (rms[c] > 3 * median) outliers.push_back(c);
    if (rms[c] > rms[worst]) worst = c;
  }
  const double mean_norm = norm_ / n, variance = centred2_ / values;
  return {{"norm", mean_norm},
          {"norm_cv", mean_norm > 0 ? std::sqrt(std::max(0.0, norm2_ / n - mean_norm * mean_norm)) / mean_norm : 0.0},
          {"mean_share", all2 > 0 ? mean2 / all2 : 0.0},
          {"rank90", energy_rank(moment, static_cast<int>(d))},
          {"rank90_centred", energy_rank(centred, static_cast<int>(d))},
          {"kurtosis", variance > 0 ? centred4_ / values / (variance * variance) : 0.0},
          {"max_abs", *std::max_element(top_.begin(), top_.end())},
          {"outlier_channels", outliers.size()},
          {"outliers", outliers},
          {"worst_channel", worst},
          {"worst_ratio", median > 0 ? rms[worst] / median : 0.0}};
}

}  // namespace vqkv
