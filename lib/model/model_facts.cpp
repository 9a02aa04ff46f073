#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "core/dtype.h"
#include "core/error.h"
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

int64_t ModelFacts::longest_context() const {
  return sliding_window > 0 ? std::min(sliding_window, context_length) : context_length;
}

void ModelFacts::require_context(int64_t tokens) const {
  if (tokens > context_length)
    fail_usage(fmt::format("a context of {} is beyond the model's {}", tokens, context_length));
  if (tokens > longest_context())
    fail_usage(
        fmt::format("a context of {} is beyond the sliding window of {} tokens in use by {}; only full attention "
                    "is computed, which is the same up to {} tokens",
                    tokens, sliding_window, name, sliding_window));
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
          {"sliding_window", sliding_window},
          {"parameters", parameters},
          {"norm_eps", norm_eps},
          {"tied_head", tied_head},
          {"qkv_bias", qkv_bias},
          {"o_bias", o_bias},
          {"qk_norm", qk_norm},
          {"kv_bytes_per_token_f16", kv_bytes_per_token(DType::kF16)},
          {"rope", rope.to_json()}};
}

ModelFacts read_model_facts(const std::string& path) { return ModelWeights::open(path)->facts(); }

}  // namespace vqkv
