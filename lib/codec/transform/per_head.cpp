#include "codec/transform/per_head.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "core/row_products.h"
#include "core/thread_pool.h"

namespace vqkv {

void HeadMatrices::forward(ConstMatrix x, MutMatrix y) const {
  const int d = head_dim;
  VQKV_CHECK(x.cols == static_cast<int64_t>(matrix.size()) * d);
  parallel_chunks(x.rows, 64, [&](int64_t first, int64_t end) {
    for (int64_t r = first; r < end; ++r)
      for (size_t h = 0; h < matrix.size(); ++h) {
        const float* in = x.row(r) + static_cast<int64_t>(h) * d;
        float* out = y.row(r) + static_cast<int64_t>(h) * d;
        std::fill_n(out, d, 0.0f);
        add_row_product(in, d, matrix[h].data(), d, out);
      }
  });
}

LinearMap HeadMatrices::map() const {
  if (matrix.size() == 1) return DenseMap{head_dim, head_dim, {matrix[0].begin(), matrix[0].end()}};
  BlockMap map;
  for (const auto& m : matrix) map.blocks.push_back({head_dim, head_dim, {m.begin(), m.end()}});
  return map;
}

void HeadMatrices::save(ParameterWriter& out, const std::string& name) const {
  std::vector<float> all;
  for (const auto& m : matrix) all.insert(all.end(), m.begin(), m.end());
  out.tensor(name, {static_cast<int64_t>(matrix.size()), head_dim, head_dim}, all.data());
}

void HeadMatrices::load(const ParameterReader& in, const std::string& name, int heads, int dim) {
  const AlignedVector<float> all = in.tensor(name, {heads, dim, dim});
  for (const float v : all)
    if (!std::isfinite(v)) fail_data(name + ": a map must be finite");
  head_dim = dim;
  matrix.clear();
  const auto size = static_cast<int64_t>(dim) * dim;
  for (int h = 0; h < heads; ++h) matrix.emplace_back(all.begin() + h * size, all.begin() + (h + 1) * size);
}

}  // namespace vqkv
