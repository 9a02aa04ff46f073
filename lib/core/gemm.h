// The one seam to a matrix product on the CPU. Any two matrices go through oneDNN's matmul primitive, one thread a
// tile: the tiles are cut by the shape alone and spread over our own pool, so the bits do not depend on the thread
// count, and no OpenMP team spins beside the pool. Weights, packed once, go through our own kernel, for one row
// (decode, at memory bandwidth) and for blocks (97 % of what oneDNN reaches): its packed layouts refuse strided
// outputs, and with one order of summation for every number of rows a block has the same bits as its tokens one at a
// time.
#pragma once
#include <memory>
#include <span>

#include "core/dtype.h"
#include "core/view.h"

namespace vqkv {

// c (m, n) = a (m, k) * op(b) [+ c when accumulate]; b is (n, k) when transpose_b, else (k, n). fp32 accumulation.
// Rows may be strided. Uses thread_count() threads, or one when called inside parallel_for; the bits are the same.
void gemm(ConstMatrix a, ConstMatrix b, bool transpose_b, MutMatrix c, bool accumulate = false);

// A weight matrix (out, in), packed once into panels of 64 outputs (core/panel.h); the only copy that is kept.
class PackedWeights {
 public:
  PackedWeights() = default;
  // f32 or bf16 storage. bf16 rounds the weights to nearest even; sums stay fp32, and inputs unless rounds_inputs().
  PackedWeights(ConstMatrix weights, DType storage);
  // Several matrices of equal in-features stacked: rows of the first, then of the second, ...
  PackedWeights(std::span<const ConstMatrix> stacked, DType storage);
  // y (m, out) = x (m, in) * W^T [+ y when accumulate]. A row has the same bits alone and in any block.
  void apply(ConstMatrix x, MutMatrix y, bool accumulate = false) const;
  // x (m, in) = y (m, out) * W [+ x when accumulate]: a gradient on its way back through apply(). Weights are widened
  // to fp32 some outputs at a time, and nothing else is rounded. The bits depend on the number of rows.
  void apply_transposed(ConstMatrix y, MutMatrix x, bool accumulate = false) const;
  // The same matrix in 4 bits: of every `group` inputs of an output one scale (f16), and codes 0..15 of w = scale *
  // (code - 8) with the scale that maps the largest magnitude to 7.5. Products widen a panel at a time and are those of
  // the widened weights in fp32.
  PackedWeights quantized(int group) const;
  int64_t bytes() const;  // held, padding included: what a product reads
  // True with bf16 storage where the processor has AVX512-BF16: inputs are rounded to bf16 too, products are exact and
  // run at twice the rate of fp32. Their bits are a processor's own, so whoever reports a number says which it was.
  bool rounds_inputs() const;
  // Row r of W, widened, into out (in). Exact.
  void copy_row(int64_t r, float* out) const;
  int64_t out_features() const;
  int64_t in_features() const;

 private:
  struct Impl;
  std::shared_ptr<const Impl> impl_;
};

}  // namespace vqkv
