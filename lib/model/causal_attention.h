// Causal softmax attention of one query head over a whole window, and its gradient, in tiles of queries and keys: no
// matrix of all scores is ever held (Dao et al., FlashAttention, arXiv 2205.14135). fp32 throughout. On one thread:
// heads are what runs side by side.
#pragma once
#include <cstdint>

#include "core/view.h"

namespace vqkv {

// One query head with its keys and values: q, k, v (n, d), any stride, q and k after RoPE; scores are scale * q.k, and
// query t sees keys [0, t].
struct AttentionHead {
  ConstMatrix q, k, v;
  float scale = 0;
};

// out (n, d): the attention output. log_sum (n): the logarithm of each query's sum of exponentials.
void attend_causal(const AttentionHead& head, MutMatrix out, float* log_sum);

// Given what attend_causal made and the gradient with respect to out: dq (n, d) is set, dk and dv (n, d) are added to.
void attend_causal_backward(const AttentionHead& head, ConstMatrix out, const float* log_sum, ConstMatrix dout,
                            MutMatrix dq, MutMatrix dk, MutMatrix dv);

}  // namespace vqkv
