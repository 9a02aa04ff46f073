// Shapes of models that tests make up.
#pragma once
#include <cmath>

#include "core/cache_shape.h"

namespace vqkv::test {

// group: query heads of a KV head. Channels are rotated in pairs, the last of an odd head not at all.
inline CacheShape make_shape(int layers, int group, int kv_heads, int head_dim) {
  CacheShape s;
  s.layers = layers;
  s.kv_heads = kv_heads;
  s.q_heads = group * kv_heads;
  s.head_dim = head_dim;
  s.rope = RopeFacts::plain(head_dim, head_dim - head_dim % 2, 10000.0);
  s.score_scale = static_cast<float>(1.0 / std::sqrt(head_dim));
  return s;
}

// 2 layers with 2 KV heads of 16 channels.
inline CacheShape small_shape() { return make_shape(2, 2, 2, 16); }

}  // namespace vqkv::test
