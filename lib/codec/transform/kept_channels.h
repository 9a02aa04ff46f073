// Some channels of each head, side by side, and none of the others: shared by prune_channels and think.
#pragma once
#include <vector>

#include "codec/transform/transform.h"

namespace vqkv {

class KeptChannels : public Transform {
 public:
  // Of each head all but floor(ratio * head_dim), the first ones until keep_best().
  KeptChannels(double ratio, const UnitShape& unit);

  UnitShape coded(const UnitShape& unit) const override;
  void forward(ConstMatrix x, MutMatrix y) const override;
  void inverse(LinearMap& map, std::vector<float>& bias) const override;
  int mixed_channels() const override { return kept_; }
  bool commutes_with_rope() const override { return false; }

 protected:
  // Those of the highest scores of each head, (channels), of equal ones the first.
  void keep_best(const std::vector<double>& score);

  UnitShape unit_;
  int kept_;                      // of a head
  std::vector<int32_t> channel_;  // (heads * kept) of the unit, rising
};

// Sum of the squares of rows [first, x.rows), a channel: (x.cols).
std::vector<double> energy_of(ConstMatrix x, int64_t first = 0);

}  // namespace vqkv
