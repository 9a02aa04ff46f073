// k-means: the rounds of faiss::Clustering around our assignment.
#pragma once
#include <cstdint>
#include <span>

#include "core/rng.h"
#include "core/view.h"

namespace vqkv {

struct KmeansOptions {
  int iterations = 25;
  // At most entries * points_per_codeword rows are trained on; a random subset of more.
  int64_t points_per_codeword = 256;
};

struct KmeansResult {
  Matrix<float> codewords;  // (entries, width)
  int64_t points = 0;       // rows trained on
  int64_t repeated = 0;     // codewords that repeat others, since the rows hold fewer distinct vectors than entries
  int iterations = 0;       // 0 where the distinct rows are the codebook
};

// x (n >= 1, width), finite; weight (n) or empty, non-negative. With no more distinct rows than entries the codebook is
// these rows in the order of their first appearance, repeated from the first to fill it: lossless, and repeats are
// never chosen since ties go to the lowest index. Otherwise `iterations` rounds from a random start; a codeword that
// loses all its rows splits the cluster of another. Bit-identical for one rng at any thread count.
KmeansResult kmeans(ConstMatrix x, std::span<const float> weight, int64_t entries, const KmeansOptions& options,
                    const Rng& rng);

}  // namespace vqkv
