// Linear maps with their structure kept: what a plan's map costs, and what of it one head needs, follow from its kind.
#pragma once
#include <cmath>
#include <cstdint>
#include <variant>
#include <vector>

namespace vqkv {

// Several functions as one, to visit a variant: one function for each kind and none for all, so that a new kind does
// not compile until everything that reads them says what it does with it (scripts/check-terms).
template <class... Functions>
struct Overloaded : Functions... {
  using Functions::operator()...;
};
template <class... Functions>
Overloaded(Functions...) -> Overloaded<Functions...>;

// x = y * map, y (rows), x (cols). Rows are the code channels of a plan, cols the channels of its unit.

struct IdentityMap {};

// x[j] = y[j] * factor[j]
struct DiagonalMap {
  std::vector<float> factor;  // (cols)
};

// x[j] = y[from[j]] * factor[j]: code channels put in their places. Channels from nowhere (-1) are 0.
struct GatherMap {
  int rows = 0;
  std::vector<int32_t> from;  // (cols)
  std::vector<float> factor;  // (cols), or empty: 1
};

// Dense blocks along the diagonal, each beginning in the row and column where the one before it ends: one a head.
struct BlockMap {
  struct Block {
    int rows = 0, cols = 0;     // without rows: columns of 0
    std::vector<float> values;  // (rows, cols), row-major
  };
  std::vector<Block> blocks;
};

// diag(before) * H * diag(after) with the orthonormal Walsh-Hadamard matrix H of every `block` channels, a power of
// two: computed by sums and differences, never written out. Signs are factors of 1 and -1.
struct HadamardMap {
  int channels = 0, block = 1;
  std::vector<float> before, after;  // (channels), or empty: 1
};

struct DenseMap {
  int rows = 0, cols = 0;
  std::vector<float> values;  // (rows, cols), row-major
};

using LinearMap = std::variant<IdentityMap, DiagonalMap, GatherMap, BlockMap, HadamardMap, DenseMap>;

bool is_identity(const LinearMap& map);

// kInternal where a map contradicts itself or is not (rows, cols).
void check_map(const LinearMap& map, int rows, int cols);

// x (cols) += y (rows) * map.
void add_product(const LinearMap& map, const double* y, int cols, double* x);
// v (rows) -> v * map (cols).
std::vector<float> apply(const LinearMap& map, const std::vector<float>& v, int cols);
// (rows, cols) written out, row-major.
std::vector<double> dense_of(const LinearMap& map, int rows, int cols);

// y * first * second, first (rows, middle), second (middle, cols), in the narrowest kind that is exact: diagonals and
// gathers stay what they are, a Hadamard map takes a diagonal on either side into its factors, and all else becomes
// blocks over the runs of channels that neither map mixes with others; one block is dense.
LinearMap compose(const LinearMap& first, const LinearMap& second, int rows, int middle, int cols);

// What a deployment keeps of it: `number` bytes a number, 2 bytes a gathered channel, 1 bit a sign.
int64_t stored_bytes(const LinearMap& map, int64_t number = sizeof(float));
// What this process keeps of it, beside the variant itself.
int64_t memory_bytes(const LinearMap& map);

// The part of a map that gives columns [first, first + count), and the rows it reads: [row, row + rows).
struct MapSlice {
  LinearMap map;
  int row = 0, rows = 0;
};
MapSlice columns_of(const LinearMap& map, int rows, int first, int count);

// v (n), n a power of two, times the orthonormal Walsh-Hadamard matrix, in place: log2(n) additions a value.
template <class T>
void walsh_hadamard(T* v, int n) {
  for (int half = 1; half < n; half *= 2)
    for (int i = 0; i < n; i += 2 * half)
      for (int j = i; j < i + half; ++j) {
        const T a = v[j], b = v[j + half];
        v[j] = a + b;
        v[j + half] = a - b;
      }
  const T scale = T{1} / std::sqrt(static_cast<T>(n));
  for (int i = 0; i < n; ++i) v[i] *= scale;
}

}  // namespace vqkv
