// Eigenvectors of small symmetric matrices, one definition of order and sign for all transforms.
#pragma once
#include <vector>

#include "core/view.h"

namespace vqkv {

struct SymmetricEigen {
  std::vector<double> values;   // (n), descending
  std::vector<double> vectors;  // (n, n) row-major, column j belongs to values[j]; its largest entry is positive
};

// a: (n, n) row-major, symmetric. kBadData when it is not finite.
SymmetricEigen symmetric_eigen(const std::vector<double>& a, int n);

// Covariance about the mean of channels [first, first + n), in token order.
std::vector<double> covariance(ConstMatrix x, int64_t first, int n);

}  // namespace vqkv
