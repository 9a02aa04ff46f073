// CommVQ's key code (arXiv 2506.18879): residual stages of one complex book each, of which a code takes two entries,
// Z_a + i Z_b. What is complex-linear commutes with RoPE, a multiplication of every pair of channels by a phase.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "codec/train/pair_search.h"
#include "core/dtype.h"
#include "core/rng.h"
#include "core/view.h"

namespace vqkv {

// The books of all stages, ready to encode. Immutable; copies share the data.
class PairQuantizer {
 public:
  PairQuantizer() = default;
  // books: (entries, width) a stage, all of one shape, [x..., y...] halves.
  explicit PairQuantizer(std::vector<Matrix<float>> books);

  int stages() const { return static_cast<int>(stages_->size()); }
  const PairSearch& stage(int i) const { return (*stages_)[static_cast<size_t>(i)]; }

  // Codes of rows x (n, width), greedily, on this thread: those of stage i of row r go to [r * row_stride + i *
  // stage_stride] of `a` and `b`. A row's codes depend on neither its neighbours nor the chunking.
  void encode_rows(ConstMatrix x, uint16_t* a, uint16_t* b, int64_t row_stride, int64_t stage_stride) const;

 private:
  std::shared_ptr<const std::vector<PairSearch>> stages_;
};

struct CommVqOptions {
  int stages = 11;
  int64_t entries = 64;
  DType stored_as = DType::kF16;  // books are rounded to it before the next stage sees their residual
  int64_t points = 8192;          // rows trained on, at most
  int64_t start_points = 128;     // of those, for the soft assignment that a stage starts from
  int steps = 12;                 // of expectation and maximization a stage, at most
};

struct CommVqTraining {
  PairQuantizer quantizer;
  std::vector<double> curve;  // error over variance on the training rows after each stage, both by importance
  int64_t vectors = 0;
  int64_t iterations = 0;
};

// Stage by stage on what the stages before leave of rows x (n, width), each divided by its token's scale already.
// weight: (n) or empty, of a row in the books; scale: (n), whose squares weigh a row's error where iterates are
// compared (that of the undivided row). As the authors' code: a start from entries^2 random rows, softly assigned at
// temperature 1; then responsibilities softmax(-|x - Z_a - i Z_b| / T) with T falling from 1e-3 to 1e-5 of
// 10^-ceil(stage / 4) over the steps; the best iterate by hard error is kept, and a stage ends with a step that neither
// improves nor loses more than 1e-5 (here of the best error). Books are rounded to multiples of a power of two, 1/512
// to 1/1024 of the largest number of the first, so that sums over stages are of whole numbers (bf16: they are left as
// they are). Training of stage i does not depend on how many follow. The same bits at any thread count.
CommVqTraining train_commvq(ConstMatrix x, std::span<const float> weight, std::span<const float> scale,
                            const CommVqOptions& options, const Rng& rng);

// What the maximization needs of the responsibilities p of rows x: count(a, b) = sum of p, and for each entry a the sum
// of rho x - i kappa x, rho and kappa being the row's marginals of a as first and as second code.
struct PairSums {
  PairSums(int64_t entries, int64_t width) : count(entries, entries), sum(entries, width) {}
  void operator+=(const PairSums& o);
  Matrix<double> count;  // (entries, entries)
  Matrix<double> sum;    // (entries, width), [x..., y...]
};
// The book (entries, width) of least sum of p |x - Z_a - i Z_b|^2: (diag(r + c) + i (N - N^T)) Z = B with N = count, r
// and c its row and column sums, B = sum; a Hermitian system. `ridge` of its mean diagonal is added to that.
Matrix<double> solve_pairs(const PairSums& sums, double ridge = 1e-8);

}  // namespace vqkv
