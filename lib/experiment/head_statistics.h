// What `vqkv-dump inspect` says of one head's rows.
#pragma once
#include <cstdint>
#include <vector>

#include "core/json_fwd.h"
#include "core/view.h"

namespace vqkv {

// Sums of one head's rows, enough for every number below. Two passes over the same rows, in any pieces, since the
// fourth moment is around the mean.
class HeadStatistics {
 public:
  explicit HeadStatistics(int64_t channels);
  void first_pass(ConstMatrix x);  // (rows, channels)
  void second_pass(ConstMatrix x);
  // norm, norm_cv      mean length of a row, and its standard deviation over the mean
  // mean_share         share of the energy that the mean row holds
  // rank90, _centred   directions that hold 90 % of the energy, of the rows and of the rows minus their mean
  // kurtosis           of all values around their channel's mean; 3 for normal ones
  // max_abs
  // outliers           channels whose RMS is above three times the median channel's; outlier_channels: how many
  // worst_channel      the one of the largest RMS; worst_ratio: that over the median channel's
  Json to_json() const;

 private:
  int64_t rows_ = 0;
  double norm_ = 0, norm2_ = 0, centred2_ = 0, centred4_ = 0;
  std::vector<double> sum_, top_;
  std::vector<double> moment_;  // (channels, channels), lower half: sums of products
};

}  // namespace vqkv
