#include <cmath>

#include "core/dtype.h"
#include "core/json.h"
#include "model/model_files.h"
#include "model/runtime.h"

namespace vqkv {

CacheShape ModelFacts::cache_shape() const {
  CacheShape shape;
  shape.layers = layers;
  shape.q_heads = q_heads;
  shape.kv_heads = kv_heads;
  shape.head_dim = head_dim;
  shape.rope = rope;
  shape.score_scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(head_dim)));
  return shape;
}

int64_t ModelFacts::kv_bytes_per_token(DType dtype) const {
  return int64_t{2} * layers * kv_heads * head_dim * static_cast<int64_t>(dtype_size(dtype));
}

Json ModelFacts::to_json() const {
  return {{"name", name},
          {"architecture", architecture},
          {"source", source},
          {"hash", hash},
          {"layers", layers},
          {"hidden", hidden},
          {"q_heads", q_heads},
          {"kv_heads", kv_heads},
          {"head_dim", head_dim},
          {"ffn", ffn},
          {"vocab", vocab},
          {"context_length", context_length},
          {"parameters", parameters},
          {"norm_eps", norm_eps},
          {"tied_head", tied_head},
          {"qkv_bias", qkv_bias},
          {"qk_norm", qk_norm},
          {"kv_bytes_per_token_f16", kv_bytes_per_token(DType::kF16)},
          {"rope", rope.to_json()}};
}

ModelFacts read_model_facts(const std::string& path) { return ModelWeights::open(path)->facts(); }

}  // namespace vqkv
