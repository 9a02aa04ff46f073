// What a ScoreMap does to scores.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

#include "codec/plan.h"

namespace vqkv {

// In place, to the n scores that one query gives the coded tokens; those of -inf are seen by nobody and stay.
template <class T>
void map_scores(const ScoreMap& map, T* s, int64_t n) {
  if (map.kind == ScoreMap::Kind::kNone) return;
  T low = std::numeric_limits<T>::infinity(), high = -low;
  for (int64_t t = 0; t < n; ++t) {
    if (std::isinf(s[t])) continue;
    low = std::min(low, s[t]);
    high = std::max(high, s[t]);
  }
  if (!(high > low)) return;
  const T to = low + map.low_shift, factor = (high - map.high_shift - to) / (high - low);
  for (int64_t t = 0; t < n; ++t)
    if (!std::isinf(s[t])) s[t] = to + (s[t] - low) * factor;
}

}  // namespace vqkv
