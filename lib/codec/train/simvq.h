// Residual SimVQ: the codebook of a stage is a frozen random matrix seen through a trained linear layer.
#pragma once
#include <cstdint>
#include <vector>

#include "codec/train/residual.h"

namespace vqkv {

struct SimVqOptions {
  int stages = 28;
  int64_t entries = 1024;
  int beam = 1;
  DType stored_as = DType::kF16;
  int64_t points_per_codeword = 64;  // rows trained on, at most
  // Alternating least squares: rounds of assignment and one (width + 1)^2 solve a stage.
  int rounds = 50;
  // Gradient descent instead, on all stages at once: Adam on the linear layers.
  bool sgd = false;
  int steps = 200;
  int64_t batch = 65536;
  double learning_rate = 1e-3;
  double beta = 0.25;  // weight of the stages' own errors beside that of the sum
};

// Codeword j of the stage is linear * base[j] + bias.
struct SimVqStage {
  uint64_t seed = 0;
  Matrix<float> linear;     // (width, width)
  std::vector<float> bias;  // (width)
};

struct SimVqTraining {
  ResidualQuantizer quantizer;
  std::vector<SimVqStage> stages;
  std::vector<double> curve;  // as ResidualTraining
  int64_t vectors = 0;
  int64_t iterations = 0;
};

// The frozen (entries, width) matrix of a seed: entries of variance 1 / width, drawn row by row from
// Rng(seed).normal().
Matrix<float> simvq_base(uint64_t seed, int64_t entries, int64_t width);
// linear * base + bias for every entry: what the layers and seeds of a codec file mean. A public seam for whoever reads
// them; the tools read the codewords, which are stored beside them.
Matrix<float> simvq_codewords(const SimVqStage& stage, int64_t entries);

// SimVQ (arXiv 2411.02038) in residual stages as VQKV (arXiv 2603.16435) uses it. Given the assignment, the layer of a
// stage is a least-squares problem in the sums of each codeword's rows, so no gradient is needed; the gradient variant
// is the published procedure, with the optimiser, the joint training of stages and the start of the layers (from the
// residual's covariance, as the alternating solver) chosen here since the paper does not state them.
// The same bits at any thread count.
SimVqTraining train_simvq(ConstMatrix x, std::span<const float> weight, const SimVqOptions& options, const Rng& rng);

}  // namespace vqkv
