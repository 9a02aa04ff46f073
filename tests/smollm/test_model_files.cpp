#include <array>
#include <map>
#include <string>

#include "core/json.h"
#include "core/thread_pool.h"
#include "io/atomic_file.h"
#include "model/model_files.h"
#include "support/catch.h"
#include "support/small_model.h"

using namespace vqkv;

namespace {

uint32_t crc32(const void* data, size_t size) {
  static const auto table = [] {
    std::array<uint32_t, 256> t{};
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t c = i;
      for (int bit = 0; bit < 8; ++bit) c = c & 1 ? 0xedb88320u ^ (c >> 1) : c >> 1;
      t[i] = c;
    }
    return t;
  }();
  uint32_t c = 0xffffffffu;
  for (size_t i = 0; i < size; ++i) c = table[(c ^ static_cast<const uint8_t*>(data)[i]) & 255] ^ (c >> 8);
  return ~c;
}

}  // namespace

TEST_CASE("facts of SmolLM2-135M-Instruct") {
  const ModelFacts facts = read_model_facts(kModel);
  CHECK(facts.architecture == "llama");
  CHECK(facts.source == "gguf");
  CHECK(facts.layers == 30);
  CHECK(facts.hidden == 576);
  CHECK(facts.q_heads == 9);
  CHECK(facts.kv_heads == 3);
  CHECK(facts.head_dim == 64);
  CHECK(facts.ffn == 1536);
  CHECK(facts.vocab == 49152);
  CHECK(facts.context_length == 8192);
  CHECK(facts.parameters == 134515008);
  CHECK(facts.norm_eps == 1e-5);
  CHECK(facts.tied_head);
  CHECK_FALSE(facts.qkv_bias);
  CHECK_FALSE(facts.qk_norm);
  CHECK(facts.rope.theta == 100000.0);
  CHECK(facts.rope.scaling == "none");
  CHECK(facts.kv_bytes_per_token(DType::kF16) == 23040);
  CHECK(facts.cache_shape().group() == 3);
  CHECK(facts.cache_shape().score_scale == 0.125f);
  CHECK(facts.hash.size() == 64);
}

TEST_CASE("tensors of SmolLM2 equal those of the gguf package in every bit, at any thread count") {
  const Json golden = parse_json(read_file(std::string(VQKV_SOURCE_DIR) + "/tests/golden/data/smollm2_tensors.json"),
                                 "smollm2_tensors.json");
  const std::map<std::string, Weight> of_layer{{"attn_norm.weight", Weight::kAttentionNorm},
                                               {"attn_q.weight", Weight::kQ},
                                               {"attn_k.weight", Weight::kK},
                                               {"attn_v.weight", Weight::kV},
                                               {"attn_output.weight", Weight::kO},
                                               {"ffn_norm.weight", Weight::kFfnNorm},
                                               {"ffn_gate.weight", Weight::kGate},
                                               {"ffn_up.weight", Weight::kUp},
                                               {"ffn_down.weight", Weight::kDown}};
  const auto weights = ModelWeights::open(kModel);
  const int threads = thread_count();
  for (const int n : {1, 3}) {
    set_thread_count(n);
    for (const auto& [name, facts] : golden.at("tensors").items()) {
      INFO(name << " with " << n << " threads");
      Weight weight = name == "output_norm.weight" ? Weight::kFinalNorm : Weight::kEmbedding;
      int layer = 0;
      if (name.starts_with("blk.")) {
        layer = std::stoi(name.substr(4));
        weight = of_layer.at(name.substr(name.find('.', 4) + 1));
      }
      const Matrix<float> w = weights->read(weight, layer);
      CHECK(w.rows * w.cols == (facts["shape"].size() == 1
                                    ? facts["shape"][0].get<int64_t>()
                                    : facts["shape"][0].get<int64_t>() * facts["shape"][1].get<int64_t>()));
      CHECK(w.storage.front() == facts["first"].get<float>());
      CHECK(w.storage.back() == facts["last"].get<float>());
      CHECK(crc32(w.data(), w.storage.size() * sizeof(float)) == facts["crc32"].get<uint32_t>());
    }
  }
  set_thread_count(threads);
  CHECK(weights->read(Weight::kHead).storage == weights->read(Weight::kEmbedding).storage);
}
