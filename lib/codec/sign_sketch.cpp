#include "codec/sign_sketch.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <mutex>
#include <numbers>
#include <numeric>
#include <tuple>

#include "core/error.h"
#include "core/rng.h"
#include "core/row_products.h"

namespace vqkv {
namespace {

// Gram-Schmidt on rows [first, end) of s (rows, width), twice: once leaves errors of the condition number.
void orthogonalize(Matrix<double>& s, int64_t first, int64_t end) {
  for (int64_t i = first; i < end; ++i) {
    double* row = s.row(i);
    for (int pass = 0; pass < 2; ++pass)
      for (int64_t j = first; j < i; ++j) {
        const double* other = s.row(j);
        const double along = std::inner_product(row, row + s.cols, other, 0.0) / static_cast<double>(s.cols);
        for (int64_t c = 0; c < s.cols; ++c) row[c] -= along * other[c];
      }
    const double length = std::sqrt(std::inner_product(row, row + s.cols, row, 0.0) / static_cast<double>(s.cols));
    for (int64_t c = 0; c < s.cols; ++c) row[c] /= length;
  }
}

std::shared_ptr<const SignSketch> draw(int rows, int width, bool orthogonal, int seed) {
  Rng rng = Rng::from_text(fmt::format("sign sketch/{}/{}/{}", seed, rows, width));
  Matrix<double> s(rows, width);
  for (double& v : s.storage) v = rng.normal();
  for (int64_t first = 0; orthogonal && first < rows; first += width)
    orthogonalize(s, first, std::min<int64_t>(rows, first + width));
  return std::make_shared<SignSketch>(width, AlignedVector<float>(s.storage.begin(), s.storage.end()));
}

}  // namespace

SignSketch::SignSketch(int width, AlignedVector<float> values)
    : width_(width), values_(std::make_shared<const AlignedVector<float>>(std::move(values))) {
  VQKV_CHECK(width >= 1 && !values_->empty() && values_->size() % static_cast<size_t>(width) == 0);
  const auto n = static_cast<size_t>(rows()), w = static_cast<size_t>(width);
  across_.resize(values_->size());
  for (size_t i = 0; i < n; ++i)
    for (size_t c = 0; c < w; ++c) across_[c * n + i] = (*values_)[i * w + c];
}

void SignSketch::signs(const double* x, int count, uint16_t* bytes) const {
  VQKV_CHECK(count <= rows());
  std::vector<double> projected(static_cast<size_t>(rows()), 0.0);
  add_row_product(x, width_, across_.data(), rows(), projected.data());
  std::fill_n(bytes, (count + 7) / 8, uint16_t{0});
  for (int i = 0; i < count; ++i)
    if (projected[static_cast<size_t>(i)] > 0) bytes[i / 8] = static_cast<uint16_t>(bytes[i / 8] | 1 << i % 8);
}

SignTerm SignSketch::term(int count) const {
  VQKV_CHECK(count >= 1 && count <= rows());
  SignTerm t;
  t.rows = count;
  t.width = width_;
  t.projection = values_;
  t.factor = static_cast<float>(std::sqrt(std::numbers::pi / 2) / count);
  return t;
}

std::shared_ptr<const SignSketch> sign_sketch(int rows, int width, bool orthogonal, int seed) {
  static std::mutex mutex;
  static std::map<std::tuple<int, int, bool, int>, std::weak_ptr<const SignSketch>> drawn;
  const std::scoped_lock lock(mutex);
  std::weak_ptr<const SignSketch>& known = drawn[{rows, width, orthogonal, seed}];
  std::shared_ptr<const SignSketch> sketch = known.lock();
  if (!sketch) known = sketch = draw(rows, width, orthogonal, seed);
  return sketch;
}

}  // namespace vqkv
