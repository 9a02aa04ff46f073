// Any bytes as the config.json (before the first zero byte) and the index (after it) of a Hugging Face folder that has
// the weights of a tiny llama: a kBadData message, or a model that can be read to the end.
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string_view>

#include "core/error.h"
#include "core/json.h"
#include "core/thread_pool.h"
#include "model/model_files.h"
#include "support/model_writers.h"

using namespace vqkv;
using namespace vqkv::testing;

namespace {

// hidden 8, 2 query heads, 1 KV head, head_dim 4, ffn 12, vocabulary 5, one layer, tied: as seeds/model_config says.
SafetensorsBuilder weights() {
  SafetensorsBuilder b;
  const auto add = [&](const std::string& name, std::vector<int64_t> shape) {
    int64_t n = 1;
    for (const int64_t axis : shape) n *= axis;
    b.tensor(name, shape, std::vector<float>(static_cast<size_t>(n), 0.5f));
  };
  const std::string layer = "model.layers.0.";
  add("model.embed_tokens.weight", {5, 8});
  add("model.norm.weight", {8});
  add(layer + "input_layernorm.weight", {8});
  add(layer + "post_attention_layernorm.weight", {8});
  add(layer + "self_attn.q_proj.weight", {8, 8});
  add(layer + "self_attn.k_proj.weight", {4, 8});
  add(layer + "self_attn.v_proj.weight", {4, 8});
  add(layer + "self_attn.o_proj.weight", {8, 8});
  add(layer + "mlp.gate_proj.weight", {12, 8});
  add(layer + "mlp.up_proj.weight", {12, 8});
  add(layer + "mlp.down_proj.weight", {8, 12});
  return b;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const auto folder = [] {
    set_thread_count(1);
    auto f = std::make_unique<TempFolder>();
    f->write("shard.safetensors", weights().build());
    return f;
  }();
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const size_t zero = text.find('\0');
  folder->write("config.json", text.substr(0, zero));
  folder->write("model.safetensors.index.json", zero == std::string_view::npos ? "" : text.substr(zero + 1));
  try {
    const auto model = ModelWeights::open(folder->path());
    (void)model->facts().to_json().dump();
    for (int w = 0; w <= static_cast<int>(Weight::kDown); ++w)
      if (model->has(static_cast<Weight>(w))) (void)model->read(static_cast<Weight>(w), 0);
  } catch (const Error& e) {
    if (e.kind() != ErrorKind::kBadData) __builtin_trap();
  }
  return 0;
}
