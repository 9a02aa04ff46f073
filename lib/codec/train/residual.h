// Residual quantization: a vector is the sum of one codeword of each stage. One stage is plain vector quantization.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "codec/train/assign.h"
#include "codec/train/kmeans.h"
#include "core/dtype.h"
#include "core/rng.h"
#include "core/view.h"

namespace vqkv {

// The codebooks of all stages, ready to encode. Immutable; copies share the data.
class ResidualQuantizer {
 public:
  ResidualQuantizer() = default;
  // books: (entries, width) a stage, all of one shape. beam 1 is greedy; a wider beam keeps that many partial sums.
  ResidualQuantizer(std::vector<Matrix<float>> books, int beam);

  int stages() const;
  int64_t entries() const;
  int64_t width() const;
  const std::vector<Matrix<float>>& books() const;

  // Codes of rows x (n, width), on this thread: stage i of row r goes to codes[r * row_stride + i * stage_stride].
  // A row's codes depend on neither its neighbours nor the chunking. Ties go to the earlier beam entry, then to the
  // lower code. error (n), unless null: squared distance to the decoded vector.
  void encode_rows(ConstMatrix x, uint16_t* codes, int64_t row_stride, int64_t stage_stride,
                   float* error = nullptr) const;

  // The same for (n, stages) codes, through the pool.
  void encode(ConstMatrix x, uint16_t* codes, float* error = nullptr) const;

  // Adds the first `stages` codewords of each row to y (n, width).
  void add_decoded(const uint16_t* codes, int64_t row_stride, int64_t stage_stride, int stages, MutMatrix y) const;

 private:
  struct Impl;
  std::shared_ptr<const Impl> impl_;
};

struct ResidualOptions {
  int stages = 1;
  int64_t entries = 256;
  int beam = 1;
  int refine = 0;                 // sweeps over all stages after the greedy training
  DType stored_as = DType::kF16;  // codewords are rounded to it before the next stage sees their residual
  KmeansOptions kmeans;
};

struct ResidualTraining {
  ResidualQuantizer quantizer;
  std::vector<double>
      curve;  // error over variance on the training rows: greedily after each stage, then after each sweep
  int64_t vectors = 0;
  int64_t iterations = 0;
  int64_t repeated = 0;  // codewords that repeat others (see KmeansResult)
};

// Stage by stage k-means on what the stages before leave (greedy), then `refine` sweeps: with the codes of all others
// fixed, the least-squares codebook of a stage is the mean of what they leave in each of its clusters; after a sweep
// the rows are encoded again, with the beam. The best books seen are kept. Training of stage i does not depend on how
// many follow, so that without refinement and with beam 1 the first stages equal a shorter code.
ResidualTraining train_residual(ConstMatrix x, std::span<const float> weight, const ResidualOptions& options,
                                const Rng& rng);

// Rounds to storage; throws kBadData where a finite number leaves its range.
void round_codewords(DType stored_as, Matrix<float>& codewords);

}  // namespace vqkv
