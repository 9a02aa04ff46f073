// Shapes of models that need not be here: what the bytes of a cache are counted from.
#pragma once
#include <span>
#include <string>

#include "config/config.h"
#include "core/cache_shape.h"

namespace vqkv {

struct NamedShape {
  const char* name;  // lower case: "llama-3.1-8b"
  int layers, q_heads, kv_heads, head_dim;
  const char* source;  // section of our notes, or a file of papers that names it
};
std::span<const NamedShape> named_shapes();

// layers, q_heads, kv_heads and head_dim of a map, all of them required, each from 1 to 65,536; the reader's other keys
// were asked for before. Rotation and scale are plain, as no byte depends on them. kUsage for heads that don't divide,
// an odd head_dim, and what is far beyond any model.
CacheShape read_shape(ConfigReader& reader);

// A name of named_shapes(), in upper or lower case, or "layers=32,q_heads=32,kv_heads=8,head_dim=128". kUsage for
// another name, with the nearest, and for what no shape is.
CacheShape find_shape(const std::string& text);

}  // namespace vqkv
