// The nearest Z_a + i Z_b of one complex book: a stage of CommVQ's key code (arXiv 2506.18879). What looks like
// entries^2 codewords costs 2 * entries inner products, since the cross term of a pair does not depend on the row.
#pragma once
#include <cstdint>
#include <vector>

#include "core/gemm.h"
#include "core/view.h"

namespace vqkv {

// Rows and codewords are complex vectors of width / 2 numbers, stored as [x..., y...]. Immutable.
//
// |x - Z_a - i Z_b|^2 = |x|^2 + u_a + v_b + cross_ab with u_a = |Z_a|^2 - 2 Re<x, Z_a>, v_b = |Z_b|^2 - 2 Re<x, i Z_b>,
// cross_ab = 2 Re<Z_a, i Z_b>. A row's scores depend on neither its neighbours nor the thread count. Ties go to the
// lowest b, then to the lowest a. As with Assigner, pairs may differ between instruction sets where two are equally
// near to within rounding.
class PairSearch {
 public:
  PairSearch() = default;
  explicit PairSearch(Matrix<float> words);  // (entries, width), width even, finite

  int64_t entries() const { return words_.rows; }
  int64_t width() const { return words_.cols; }
  const Matrix<float>& words() const { return words_; }

  // u and v (x.rows, stride()) of rows x (n, width); turned: scratch of the shape of x, becomes -i x.
  void scores(ConstMatrix x, MutMatrix turned, MutMatrix u, MutMatrix v) const;
  int64_t stride() const { return stride_; }  // entries rounded up to whole vectors; what lies beyond is in no pair

  struct Pair {
    int32_t a = 0, b = 0;
    float score = 0;  // squared distance less |x|^2
  };
  // Of one row's u and v (stride()).
  Pair nearest(const float* u, const float* v) const;

  // Blocks of pairs of one a and neighbouring b, in the order of a, then b.
  struct Shares {
    static constexpr int64_t kBlock = 16;
    struct Block {
      int32_t a = 0, b = 0;  // b: the first of kBlock, a multiple of it
    };
    std::vector<Block> blocks;
    AlignedVector<float> p;  // (blocks, kBlock) of what was used so far; 0: no share
  };
  // exp((least - |x - Z_a - i Z_b|) / temperature), for a row of squared length `norm` whose nearest pair is at
  // distance `least`: all that are e^-20 and more. `out` is emptied first.
  void shares(const float* u, const float* v, float norm, float least, float temperature, Shares& out) const;

  // Of shares scaled to a total of `weight`: count (entries, count_stride) += each; rho (entries) and kappa (entries) =
  // their sums by a and by b.
  void add(const Shares& shares, double weight, double* count, int64_t count_stride, double* rho, double* kappa) const;

  // x (width) -= Z_a + i Z_b.
  void subtract(const Pair& pair, float* x) const;

 private:
  Matrix<float> words_;
  int64_t stride_ = 0;
  PackedWeights products_;          // -2 Z
  AlignedVector<float> norm_;       // (stride) |Z_a|^2, infinite beyond the entries
  AlignedVector<float> cross_;      // (entries, stride)
  std::vector<float> cross_least_;  // (entries): of each row of it
};

}  // namespace vqkv
