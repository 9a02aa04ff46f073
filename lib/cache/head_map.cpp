#include "cache/head_map.h"

#include <algorithm>

#include "core/index.h"
#include "core/small_matrix.h"

namespace vqkv {
namespace {

using kernels::padded;

void scale(float* x, const std::vector<float>& factor) {
  for (size_t c = 0; c < factor.size(); ++c) x[c] *= factor[c];
}
void scale_columns(float* x, int64_t stride, int64_t n, const std::vector<float>& factor) {
  for (size_t c = 0; c < factor.size(); ++c) kernels::scale_row(x + static_cast<int64_t>(c) * stride, n, factor[c]);
}

// walsh_hadamard() of n tokens that lie beside each other.
void hadamard_columns(float* x, int64_t stride, int64_t n, int block) {
  for (int half = 1; half < block; half *= 2)
    for (int i = 0; i < block; i += 2 * half)
      for (int j = i; j < i + half; ++j) {
        float* __restrict a = x + j * stride;
        float* __restrict b = x + (j + half) * stride;
        for (int64_t t = 0; t < n; ++t) {
          const float sum = a[t] + b[t], difference = a[t] - b[t];
          a[t] = sum;
          b[t] = difference;
        }
      }
  const float f = 1.0f / std::sqrt(static_cast<float>(block));
  for (int c = 0; c < block; ++c) kernels::scale_row(x + c * stride, n, f);
}

// x = x * diag(before) * H * diag(after)
void hadamard_row(float* x, int channels, int block, const std::vector<float>& before,
                  const std::vector<float>& after) {
  scale(x, before);
  for (int c = 0; c < channels; c += block) walsh_hadamard(x + c, block);
  scale(x, after);
}

float factor_of(const std::vector<float>& factor, int64_t c) { return factor.empty() ? 1.0f : factor[at(c)]; }

}  // namespace

HeadMap::HeadMap(const LinearMap& map, int code_channels, int first, int cols)
    : part_(columns_of(map, code_channels, first, cols)), cols_(cols) {
  const auto write_out = [&](int row, int col, int rows, int width, const std::vector<float>& values) {
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < width; ++j) {
        const float v = values[at(int64_t{i} * width + j)];
        wide_[at((row + i) * padded(cols_) + col + j)] = v;
        tall_[at((col + j) * padded(part_.rows) + row + i)] = v;
      }
  };
  const auto grow = [&] {
    wide_.assign(at(part_.rows * padded(cols_)), 0.0f);
    tall_.assign(at(cols_ * padded(part_.rows)), 0.0f);
  };
  moves_ = std::visit(Overloaded{[](const IdentityMap&) { return false; }, [](const DiagonalMap&) { return false; },
                                 [](const GatherMap&) { return true; },
                                 [&](const BlockMap& m) {
                                   grow();
                                   int row = 0, col = 0;
                                   for (const BlockMap::Block& b : m.blocks) {
                                     write_out(row, col, b.rows, b.cols, b.values);
                                     row += b.rows;
                                     col += b.cols;
                                   }
                                   return true;
                                 },
                                 [](const HadamardMap&) { return true; },
                                 [&](const DenseMap& m) {
                                   grow();
                                   write_out(0, 0, m.rows, m.cols, m.values);
                                   return true;
                                 }},
                      part_.map);
  if (!wide_.empty()) part_.map = IdentityMap{};  // written out
}

const std::vector<float>& HeadMap::diagonal() const {
  static const std::vector<float> none;
  const auto* m = std::get_if<DiagonalMap>(&part_.map);
  return m ? m->factor : none;
}

void HeadMap::multiply(const float* y, int64_t y_stride, float* x, int64_t x_stride, int64_t n, bool accumulate) const {
  if (!wide_.empty()) {
    kernels::multiply(y, y_stride, wide_.data(), padded(cols_), x, x_stride, n, part_.rows, padded(cols_), accumulate);
    return;
  }
  AlignedVector<float> turned;
  for (int64_t t = 0; t < n; ++t) {
    const float* from = y + t * y_stride;
    float* to = x + t * x_stride;
    if (!accumulate) std::fill_n(to, cols_, 0.0f);
    const auto add_places = [&](const std::vector<float>& factor) {
      for (int64_t c = 0; c < cols_; ++c) to[c] += from[c] * factor_of(factor, c);
    };
    std::visit(
        Overloaded{[&](const IdentityMap&) { add_places({}); }, [&](const DiagonalMap& m) { add_places(m.factor); },
                   [&](const GatherMap& m) {
                     for (int64_t c = 0; c < cols_; ++c)
                       if (m.from[at(c)] >= 0) to[c] += from[m.from[at(c)]] * factor_of(m.factor, c);
                   },
                   [](const BlockMap&) {},  // written out
                   [&](const HadamardMap& m) {
                     turned.assign(from, from + cols_);
                     hadamard_row(turned.data(), m.channels, m.block, m.before, m.after);
                     for (int64_t c = 0; c < cols_; ++c) to[c] += turned[at(c)];
                   },
                   [](const DenseMap&) {}},
        part_.map);
  }
}

void HeadMap::fold(const float* x, int64_t x_stride, float* y, int64_t y_stride, int64_t n) const {
  if (!tall_.empty()) {
    kernels::multiply(x, x_stride, tall_.data(), y_stride, y, y_stride, n, cols_, y_stride, false);
    return;
  }
  for (int64_t t = 0; t < n; ++t) {
    const float* from = x + t * x_stride;
    float* to = y + t * y_stride;
    std::fill_n(to, y_stride, 0.0f);
    std::visit(Overloaded{[&](const IdentityMap&) { std::copy_n(from, cols_, to); },
                          [&](const DiagonalMap& m) {
                            std::copy_n(from, cols_, to);
                            scale(to, m.factor);
                          },
                          [&](const GatherMap& m) {
                            for (int64_t c = 0; c < cols_; ++c)
                              if (m.from[at(c)] >= 0) to[m.from[at(c)]] += from[c] * factor_of(m.factor, c);
                          },
                          [](const BlockMap&) {},      // written out
                          [&](const HadamardMap& m) {  // H is symmetric
                            std::copy_n(from, cols_, to);
                            hadamard_row(to, m.channels, m.block, m.after, m.before);
                          },
                          [](const DenseMap&) {}},
               part_.map);
  }
}

void HeadMap::turn(float* x, int64_t stride, int64_t n, bool transposed) const {
  const auto& m = std::get<HadamardMap>(part_.map);
  if (!transposed) {
    for (int64_t t = 0; t < n; ++t) hadamard_row(x + t * stride, m.channels, m.block, m.before, m.after);
    return;
  }
  scale_columns(x, stride, n, m.before);
  for (int c = 0; c < m.channels; c += m.block) hadamard_columns(x + c * stride, stride, n, m.block);
  scale_columns(x, stride, n, m.after);
}

int64_t HeadMap::memory_bytes() const {
  return vqkv::memory_bytes(part_.map) + static_cast<int64_t>((wide_.capacity() + tall_.capacity()) * sizeof(float));
}

}  // namespace vqkv
