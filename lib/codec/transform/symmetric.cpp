#include "codec/transform/symmetric.h"

// One thread: OpenMP would choose blockings by the thread count, and with them the rounding.
#define EIGEN_DONT_PARALLELIZE
#include <Eigen/Eigenvalues>
#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "core/row_products.h"

namespace vqkv {

SymmetricEigen symmetric_eigen(const std::vector<double>& a, int n) {
  for (const double v : a)
    if (!std::isfinite(v)) fail_data("a covariance is not finite");
  using RowMajor = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  const Eigen::MatrixXd m = Eigen::Map<const RowMajor>(a.data(), n, n);
  const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> solver(0.5 * (m + m.transpose()));
  if (solver.info() != Eigen::Success) fail_data("the eigenvectors of a covariance did not converge");
  SymmetricEigen out;
  out.values.resize(static_cast<size_t>(n));
  out.vectors.resize(static_cast<size_t>(n) * static_cast<size_t>(n));
  for (int j = 0; j < n; ++j) {
    const int from = n - 1 - j;  // Eigen sorts ascending
    out.values[static_cast<size_t>(j)] = solver.eigenvalues()[from];
    int largest = 0;
    for (int i = 1; i < n; ++i)
      if (std::abs(solver.eigenvectors()(i, from)) > std::abs(solver.eigenvectors()(largest, from)) * (1 + 1e-9))
        largest = i;
    const double sign = solver.eigenvectors()(largest, from) < 0 ? -1 : 1;
    for (int i = 0; i < n; ++i)
      out.vectors[static_cast<size_t>(i) * static_cast<size_t>(n) + static_cast<size_t>(j)] =
          sign * solver.eigenvectors()(i, from);
  }
  return out;
}

std::vector<double> covariance(ConstMatrix x, int64_t first, int n) {
  const auto size = static_cast<size_t>(n);
  constexpr int64_t kRows = 64;
  std::vector<double> mean(size, 0.0), c(size * size, 0.0), v(static_cast<size_t>(kRows) * size);
  for (int64_t r = 0; r < x.rows; ++r)
    for (size_t i = 0; i < size; ++i) mean[i] += x(r, first + static_cast<int64_t>(i));
  const double count = x.rows > 0 ? static_cast<double>(x.rows) : 1.0;
  for (double& m : mean) m /= count;
  for (int64_t r0 = 0; r0 < x.rows; r0 += kRows) {
    const int64_t rows = std::min(kRows, x.rows - r0);
    for (int64_t r = 0; r < rows; ++r)
      for (size_t i = 0; i < size; ++i)
        v[static_cast<size_t>(r) * size + i] = x(r0 + r, first + static_cast<int64_t>(i)) - mean[i];
    add_outer_products(v.data(), nullptr, rows, n, c.data());
  }
  for (size_t i = 0; i < size; ++i)
    for (size_t j = 0; j <= i; ++j) c[j * size + i] = c[i * size + j] /= count;
  return c;
}

}  // namespace vqkv
