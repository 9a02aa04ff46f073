// A model of 2 layers with 2 KV heads of 16 channels.
#pragma once
#include "core/cache_shape.h"

namespace vqkv::test {

inline CacheShape small_shape() {
  CacheShape s;
  s.layers = 2;
  s.q_heads = 4;
  s.kv_heads = 2;
  s.head_dim = 16;
  s.rope = RopeFacts::plain(16, 16, 10000.0);
  s.score_scale = 0.25f;
  return s;
}

}  // namespace vqkv::test
