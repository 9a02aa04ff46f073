// The one seam to a matrix product on the CPU (oneDNN's matmul primitive, which gives the same bits at every thread
// count; its sgemm call does not).
#pragma once
#include "core/dtype.h"
#include "core/view.h"

namespace vqkv {

// c (m, n) = a (m, k) * op(b) [+ c when accumulate]; b is (n, k) when transpose_b, else (k, n). fp32 accumulation.
// Rows may be strided. Uses thread_count() threads, or one when called inside parallel_for.
void gemm(ConstMatrix a, ConstMatrix b, bool transpose_b, MutMatrix c, bool accumulate = false);

// A weight matrix (out, in), packed once into the layout that the product likes.
class PackedWeights {
 public:
  PackedWeights() = default;
  // f32 or bf16 storage; bf16 rounds the weights to nearest even and the inputs too (as the instructions do).
  PackedWeights(ConstMatrix weights, DType storage);
  // y (m, out) = x (m, in) * W^T [+ y when accumulate]
  void apply(ConstMatrix x, MutMatrix y, bool accumulate = false) const;
  int64_t out_features() const;
  int64_t in_features() const;
  int64_t bytes() const;

 private:
  struct Impl;
  std::shared_ptr<const Impl> impl_;
};

}  // namespace vqkv
