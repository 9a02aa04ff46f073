// What every layer of the program needs to know of a model's cache: codecs, caches, attention, traces and models share
// it.
#pragma once
#include "core/rope.h"

namespace vqkv {

struct CacheShape {
  int layers = 0;
  int q_heads = 0;
  int kv_heads = 0;
  int head_dim = 0;
  RopeFacts rope;
  float score_scale = 0;                            // multiplies q.k; 1/sqrt(head_dim) unless the model says otherwise
  int group() const { return q_heads / kv_heads; }  // query heads a KV head
};

}  // namespace vqkv
