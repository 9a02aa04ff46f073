// Dense maps that act on each head of a unit alone: shared by rotation and query_metric.
#pragma once
#include <vector>

#include "codec/transform/transform.h"

namespace vqkv {

// One (head_dim, head_dim) matrix a head, row-major: y = x * matrix[head].
struct HeadMatrices {
  int head_dim = 0;
  std::vector<AlignedVector<float>> matrix;

  void forward(ConstMatrix x, MutMatrix y) const;
  LinearMap map() const;                                           // one block a head
  void save(ParameterWriter& out, const std::string& name) const;  // (heads, head_dim, head_dim)
  void load(const ParameterReader& in, const std::string& name, int heads, int head_dim);
};

}  // namespace vqkv
