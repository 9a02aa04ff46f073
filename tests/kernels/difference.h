// How far one matrix lies from another.
#pragma once
#include <cmath>

#include "core/view.h"

namespace vqkv {

// Root mean square of the difference over that of `b`; centred: over that of its numbers less their mean.
inline double relative_difference(const Matrix<float>& a, const Matrix<float>& b, bool centred = false) {
  double error = 0, size = 0, mean = 0;
  if (centred)
    for (const float v : b.storage) mean += double{v} / static_cast<double>(b.storage.size());
  for (size_t i = 0; i < b.storage.size(); ++i) {
    error += std::pow(double{a.storage[i]} - double{b.storage[i]}, 2);
    size += std::pow(double{b.storage[i]} - mean, 2);
  }
  return std::sqrt(error / size);
}

}  // namespace vqkv
