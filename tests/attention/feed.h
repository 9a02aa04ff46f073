// Tokens through every layer of a sequence.
#pragma once
#include "attention/plan_codec.h"
#include "attention/sequence.h"

namespace vqkv::test {

// n tokens of x from `first` as one block, the same rows in every layer; the last layer's output (n, q_heads * d).
inline Matrix<float> feed(Sequence& sequence, const Tokens& x, int64_t first, int64_t n) {
  Matrix<float> out(n, x.q.cols);
  sequence.session().begin_block(n);
  for (int layer = 0; layer < sequence.cache().shape().layers; ++layer)
    sequence.session().attend(layer, x.q.view().slice_rows(first, n), x.k.view().slice_rows(first, n),
                              x.v.view().slice_rows(first, n), out);
  sequence.session().end_block();
  return out;
}

}  // namespace vqkv::test
