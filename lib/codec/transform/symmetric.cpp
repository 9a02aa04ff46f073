#include "codec/transform/symmetric.h"

// One thread: OpenMP would choose blockings by the thread count, and with them the rounding.
#define EIGEN_DONT_PARALLELIZE
#include <Eigen/Eigenvalues>
#include <cmath>

#include "core/error.h"

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
  std::vector<double> mean(size, 0.0), c(size * size, 0.0), v(size);
  for (int64_t r = 0; r < x.rows; ++r)
    for (size_t i = 0; i < size; ++i) mean[i] += x(r, first + static_cast<int64_t>(i));
  const double count = x.rows > 0 ? static_cast<double>(x.rows) : 1.0;
  for (double& m : mean) m /= count;
  for (int64_t r = 0; r < x.rows; ++r) {
    for (size_t i = 0; i < size; ++i) v[i] = x(r, first + static_cast<int64_t>(i)) - mean[i];
    for (size_t i = 0; i < size; ++i)
      for (size_t j = 0; j <= i; ++j) c[i * size + j] += v[i] * v[j];
  }
  for (size_t i = 0; i < size; ++i)
    for (size_t j = 0; j <= i; ++j) c[j * size + i] = c[i * size + j] /= count;
  return c;
}

}  // namespace vqkv
