// Learned rotations for product codes.
#pragma once
#include "core/rng.h"
#include "core/view.h"

namespace vqkv {

struct OpqOptions {
  int groups = 8;       // sub-vectors of the product code that the rotation serves
  int iterations = 20;  // alternations of rotation and codes
  int64_t points = 65536;
};

// Optimised product quantization (Ge et al., TPAMI 2014) by faiss::OPQMatrix: the orthonormal (d, d) matrix A whose
// y = x * A^T suits a product code of `groups` sub-vectors with 256 codewords. x: (n, d), finite, n >= 256. The same
// bits at any thread count.
Matrix<float> opq_rotation(ConstMatrix x, const OpqOptions& options, Rng rng);

}  // namespace vqkv
