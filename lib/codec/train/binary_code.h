// CommVQ's value code (arXiv 2506.18879): a small network picks bits, and a vector is the sum of a learned matrix' rows
// whose bits are set, brought to the length that it had.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "core/gemm.h"
#include "core/rng.h"
#include "core/view.h"

namespace vqkv {

// Of vectors of `width` channels and 2 * symbols bits. All finite.
struct BinaryCode {
  std::vector<float> channel_scale;  // (width), above 0
  Matrix<float> first;               // (hidden, width)
  std::vector<float> first_bias;     // (hidden)
  Matrix<float> second;              // (4 * symbols, hidden)
  std::vector<float> second_bias;    // (4 * symbols)
  Matrix<float> rows;                // (2 * symbols, width), channel scale included

  int64_t width() const { return rows.cols; }
  int64_t symbols() const { return rows.rows / 2; }
  int64_t hidden() const { return first.rows; }
  // f(name, shape, values) of each array of a code, const or not.
  template <class Code, class F>
  static void visit(Code& code, F&& f) {
    using Shape = std::vector<int64_t>;
    f("channel_scale", Shape{code.width()}, code.channel_scale.data());
    f("first", Shape{code.hidden(), code.width()}, code.first.data());
    f("first_bias", Shape{code.hidden()}, code.first_bias.data());
    f("second", Shape{4 * code.symbols(), code.hidden()}, code.second.data());
    f("second_bias", Shape{4 * code.symbols()}, code.second_bias.data());
    f("rows", Shape{2 * code.symbols(), code.width()}, code.rows.data());
  }
};
// One of these sizes, all numbers 0 but the channel scales, which are 1.
BinaryCode empty_binary_code(int64_t width, int64_t symbols, int64_t hidden);

// Ready to encode. Immutable.
//
// A vector x over the channel scales, c, and over its length p then: LayerNorm (mean 0, variance 1, without gains,
// which the first layer has), a layer, GELU, a layer, and of every four numbers the largest (of equal ones the first),
// 0 to 3, sets bits (1, 0), (0, 1), (1, 1) or (0, 0). It stands for p c * (s E) / |s E|, of which scale = p / |s E| is
// stored: rows holds c * E.
class BinaryEncoder {
 public:
  BinaryEncoder() = default;
  explicit BinaryEncoder(BinaryCode code);
  const BinaryCode& code() const { return code_; }

  // Rows x (n, width) on this thread: bits (n, 2 * symbols / 8 rounded up) with `stride` between rows, bit b of byte i
  // being bit 8 i + b, lowest first; scale (n), not rounded. A row's bits depend on neither its neighbours nor the
  // chunking.
  void encode_rows(ConstMatrix x, uint16_t* bits, int64_t stride, float* scale) const;

 private:
  BinaryCode code_;
  PackedWeights first_, second_;
};

struct BinaryCodeOptions {
  int64_t symbols = 0;  // width / 2 a bit a channel
  int64_t hidden = 0;
  int steps = 300;
  int64_t batch = 256;
  double learning_rate = 1e-3;
};
// By gradient descent on the squared error of rows x (n, width), over their mean square: symbols are drawn (hard
// Gumbel-softmax at temperature 1, gradients straight through), AdamW with decay 0.1 and moments 0.9 and 0.95,
// gradients of length 1 at most, a tenth of the steps but at most 100 of warm-up, then a cosine to 0. As the authors',
// but for the error of attention's outputs, which they add. The largest number of `rows` is 1 to 2 in the end, since
// their length has no meaning. weight: (n) or empty. The same bits at any thread count.
BinaryCode train_binary_code(ConstMatrix x, std::span<const float> weight, const BinaryCodeOptions& options,
                             const Rng& rng);

}  // namespace vqkv
