// Rows for codecs, what a codec makes of them, and how far that is.
#pragma once
#include <cmath>
#include <utility>

#include "codec/codec.h"
#include "core/rng.h"

namespace vqkv::test {

inline UnitShape unit_of(int head_dim, int heads = 1, Role role = Role::kKey, int layer = 0) {
  UnitShape u;
  u.role = role;
  u.layer = layer;
  u.head_dim = head_dim;
  u.heads = heads;
  return u;
}

inline Matrix<float> gaussian(int64_t rows, int64_t cols, uint64_t key, double mean = 0) {
  Matrix<float> m(rows, cols);
  Rng rng(key);
  for (auto& v : m.storage) v = static_cast<float>(mean + rng.normal());
  return m;
}

// What is decoded of what a codec of a prompt, or of any, makes of the rows x.
inline Matrix<float> through(const Codec& codec, ConstMatrix x, const SequenceState* state,
                             CodeBlock* codes = nullptr) {
  CodeBlock block;
  codec.encode(x, block, state);
  Matrix<float> y(x.rows, x.cols);
  codec.decode(block, y, {-1, state});
  if (codes) *codes = std::move(block);
  return y;
}
inline Matrix<float> round_trip(const Codec& codec, ConstMatrix x, CodeBlock* codes = nullptr) {
  return through(codec, x, nullptr, codes);
}

// |y - x|^2 / |x|^2.
inline double relative_error(const Matrix<float>& y, const Matrix<float>& x) {
  double error = 0, power = 0;
  for (size_t i = 0; i < x.storage.size(); ++i) {
    error += std::pow(double{x.storage[i]} - y.storage[i], 2);
    power += std::pow(double{x.storage[i]}, 2);
  }
  return error / power;
}

}  // namespace vqkv::test
