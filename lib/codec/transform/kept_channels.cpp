#include "codec/transform/kept_channels.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace vqkv {

KeptChannels::KeptChannels(double ratio, const UnitShape& unit)
    : unit_(unit), kept_(unit.head_dim - static_cast<int>(std::floor(ratio * unit.head_dim))) {
  keep_best(std::vector<double>(static_cast<size_t>(unit.channels()), 0.0));
}

UnitShape KeptChannels::coded(const UnitShape& unit) const {
  UnitShape out = unit;
  if (kept_ == unit.head_dim) return out;
  out.head_dim = kept_;
  out.rope_facts = RopeFacts::plain(kept_, 0, 1);  // halves of RoPE pairs are gone
  return out;
}

void KeptChannels::keep_best(const std::vector<double>& score) {
  channel_.clear();
  const auto d = static_cast<size_t>(unit_.head_dim);
  for (size_t first = 0; first < score.size(); first += d) {
    std::vector<int32_t> order(d);
    std::iota(order.begin(), order.end(), static_cast<int32_t>(first));
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
      return score[static_cast<size_t>(a)] > score[static_cast<size_t>(b)];
    });
    std::sort(order.begin(), order.begin() + kept_);
    channel_.insert(channel_.end(), order.begin(), order.begin() + kept_);
  }
}

void KeptChannels::forward(ConstMatrix x, MutMatrix y) const {
  for (int64_t r = 0; r < x.rows; ++r)
    for (size_t i = 0; i < channel_.size(); ++i) y(r, static_cast<int64_t>(i)) = x(r, channel_[i]);
}

void KeptChannels::inverse(LinearMap& map, std::vector<float>&) const {
  GatherMap gather{
      static_cast<int>(channel_.size()), std::vector<int32_t>(static_cast<size_t>(unit_.channels()), -1), {}};
  for (size_t i = 0; i < channel_.size(); ++i) gather.from[static_cast<size_t>(channel_[i])] = static_cast<int32_t>(i);
  map = std::move(gather);
}

std::vector<double> energy_of(ConstMatrix x, int64_t first) {
  std::vector<double> out(static_cast<size_t>(x.cols), 0.0);
  for (int64_t r = first; r < x.rows; ++r)
    for (size_t c = 0; c < out.size(); ++c) {
      const double v = x(r, static_cast<int64_t>(c));
      out[c] += v * v;
    }
  return out;
}

}  // namespace vqkv
