// Model files of every family: the same facts and weights from GGUF and folders, and what is refused.
#include "model/model_files.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/error.h"
#include "core/json.h"
#include "model/family_models.h"
#include "support/catch.h"
#include "support/model_writers.h"

using namespace vqkv;
using namespace vqkv::testing;

TEST_CASE("a GGUF and a Hugging Face folder of one model give the same facts and the same weights in every bit") {
  for (const std::string family : {"llama", "qwen2", "qwen3", "llama+bias", "qwen3+bias"}) {
    for (const bool tied : {true, false}) {
      INFO(family << (tied ? " tied" : ""));
      const TempFolder folder, hf_folder;
      const auto gguf = ModelWeights::open(folder.write("m.gguf", gguf_model(family, tied).build()));
      const auto hf = open_hf(hf_folder, hf_model(family, tied));
      ModelFacts a = gguf->facts(), b = hf->facts();
      CHECK(a.source == "gguf");
      CHECK(b.source == "hf");
      CHECK(a.hash != b.hash);
      CHECK(a.name == "tiny");
      b.source = a.source, b.hash = a.hash, b.name = a.name;
      CHECK(a.to_json() == b.to_json());
      CHECK(a.qkv_bias == (family == "qwen2" || family.ends_with("+bias")));
      CHECK(a.o_bias == family.ends_with("+bias"));
      CHECK(a.qk_norm == family.starts_with("qwen3"));
      CHECK(a.tied_head == tied);
      for (const Weight w : kAll) {
        REQUIRE(gguf->has(w) == hf->has(w));
        if (!gguf->has(w)) continue;
        for (int layer = 0; layer < kLayers; ++layer) {
          const Matrix<float> x = gguf->read(w, layer), y = hf->read(w, layer);
          CHECK(x.rows == gguf->rows(w));
          CHECK(x.cols == gguf->cols(w));
          CHECK(x.storage == y.storage);
        }
      }
      CHECK(gguf->read(Weight::kHead)(0, 0) == (tied ? values(1, 1) : values(1, 3))[0]);
      CHECK(gguf->read(Weight::kQ, 1)(5, 3) == values(100, 31)[5 * kHidden + 3]);
    }
  }
}

TEST_CASE("biases of llama GGUF files are put back in half-split order too, and rows can be read apart") {
  const TempFolder folder;
  const auto weights = ModelWeights::open(folder.write("m.gguf", gguf_model("llama+bias", true).build()));
  CHECK(weights->facts().qkv_bias);
  const Matrix<float> bias = weights->read(Weight::kQBias, 0);
  const std::vector<float> expected = values(kQ * kDim, 19);
  CHECK(std::equal(expected.begin(), expected.end(), bias.data()));
  const Matrix<float> whole = weights->read(Weight::kK, 1);
  Matrix<float> wide(3, kHidden + 5, -1.0f);
  weights->read_rows(Weight::kK, 1, 4, 3, wide.view().slice_cols(2, kHidden));
  for (int r = 0; r < 3; ++r) {
    for (int c = 0; c < kHidden; ++c) CHECK(wide(r, c + 2) == whole(r + 4, c));
    CHECK(wide(r, 1) == -1.0f);
    CHECK(wide(r, kHidden + 2) == -1.0f);
  }
}

TEST_CASE("the identity of a model follows its content, not its name") {
  const TempFolder folder;
  GgufBuilder b = gguf_model("llama", true);
  const std::string one = ModelWeights::open(folder.write("one.gguf", b.build()))->facts().hash;
  CHECK(ModelWeights::open(folder.write("two.gguf", b.build()))->facts().hash == one);
  b.at("blk.1.ffn_down.weight").data.back() ^= 1;
  CHECK(ModelWeights::open(folder.write("one.gguf", b.build()))->facts().hash != one);
}

TEST_CASE("a weight that is not finite is refused with its place when it is read") {
  const TempFolder folder;
  for (const char* tensor : {"blk.1.ffn_down.weight", "blk.1.attn_q.weight", "blk.0.attn_norm.weight"}) {
    GgufBuilder b = gguf_model("llama", true);
    const float nan = std::nanf("");
    std::string& data = b.at(tensor).data;
    std::memcpy(data.data() + data.size() - sizeof nan, &nan, sizeof nan);
    const auto weights = ModelWeights::open(folder.write("m.gguf", b.build()));
    std::string said;
    try {
      for (const Weight w : {Weight::kDown, Weight::kQ}) (void)weights->read(w, 1);
      (void)weights->read(Weight::kAttentionNorm, 0);
    } catch (const Error& e) { said = e.what(); }
    check_says(said, {"m.gguf", tensor, "is nan; weights must be finite"});
  }
}

TEST_CASE("a name that is not UTF-8 stays a name, in JSON too") {
  const TempFolder folder;
  GgufBuilder b = gguf_model("llama", true);
  b.value("general.name").payload = gguf_text("ti\xffny\n");
  const auto weights = ModelWeights::open(folder.write("m.gguf", b.build()));
  CHECK(weights->facts().name == "ti\xef\xbf\xbdny?");
  CHECK(weights->facts().to_json().dump().find("ny?") != std::string::npos);
}

TEST_CASE("a head stored beside tie_word_embeddings: of the same bytes it is the embedding, of others it is used") {
  for (const bool same : {true, false}) {
    const TempFolder folder, plain_folder;
    HfModel m = hf_model("llama", true);
    m.weights.tensor("lm_head.weight", {kVocab, kHidden}, values(kVocab * kHidden, same ? 1 : 3));
    const auto weights = open_hf(folder, m);
    CHECK(weights->facts().tied_head == same);
    CHECK(weights->facts().parameters ==
          open_hf(plain_folder, hf_model("llama", true))->facts().parameters + (same ? 0 : kVocab * kHidden));
    const Matrix<float> head = weights->read(Weight::kHead);
    CHECK(std::ranges::equal(head.storage, values(kVocab * kHidden, same ? 1 : 3)));
    const Matrix<float> embedding = weights->read(Weight::kEmbedding);
    CHECK(std::ranges::equal(embedding.storage, values(kVocab * kHidden, 1)));
  }
  check_says(hf_refusal("llama",
                        [](auto& m) {
                          m.weights.tensor("lm_head.weight", {2, kHidden}, values(24, 3));
                        }),
             {"lm_head.weight", "(2, 12)", "(11, 12) expected"});
  // A GGUF with output.weight has a head of its own.
  const TempFolder folder;
  const auto gguf = ModelWeights::open(folder.write("m.gguf", gguf_model("llama", false).build()));
  CHECK_FALSE(gguf->facts().tied_head);
  CHECK(std::ranges::equal(gguf->read(Weight::kHead).storage, values(kVocab * kHidden, 3)));
}

TEST_CASE("a tied head stored alone is the embedding too") {
  const TempFolder folder, plain_folder;
  HfModel m = hf_model("qwen3", true);
  m.weights.rename("model.embed_tokens.weight", "lm_head.weight");
  const auto alone = open_hf(folder, m), plain = open_hf(plain_folder, hf_model("qwen3", true));
  CHECK(alone->facts().tied_head);
  for (const Weight w : {Weight::kEmbedding, Weight::kHead}) CHECK(alone->read(w).storage == plain->read(w).storage);
  m.config["tie_word_embeddings"] = false;
  check_says(data_error_of([&] { open_hf(folder, m); }), {"model.embed_tokens.weight is missing"});
}

TEST_CASE("tensors without the model. prefix are the same model") {
  const TempFolder folder, plain_folder;
  HfModel m = hf_model("qwen2", true);
  const Json header = m.weights.header;
  for (const auto& [name, entry] : header.items()) m.weights.rename(name, name.substr(std::string("model.").size()));
  const auto bare = open_hf(folder, m), plain = open_hf(plain_folder, hf_model("qwen2", true));
  CHECK(bare->facts().parameters == plain->facts().parameters);
  for (const Weight w : kAll) {
    if (!plain->has(w)) continue;
    for (int layer = 0; layer < kLayers; ++layer) CHECK(bare->read(w, layer).storage == plain->read(w, layer).storage);
  }
  m.config["tie_word_embeddings"] = false;  // what such a class saves has no head
  check_says(data_error_of([&] { open_hf(folder, m); }), {"lm_head.weight is missing"});
  m = hf_model("llama", true);
  m.weights.tensor("norm.weight", {kHidden}, values(kHidden, 2));  // both forms at once
  check_says(data_error_of([&] { open_hf(folder, m); }), {"norm.weight", "not part"});
}

TEST_CASE("keys that a family's class doesn't read change nothing") {
  for (const char* family : {"qwen2", "mistral"})
    for (const bool value : {true, false})
      CHECK(hf_refusal(family, [&](auto& m) {
              m.config.update({{"attention_bias", value}, {"mlp_bias", value}});
            }).empty());
  // A bias that is stored would be read by nothing.
  check_says(hf_refusal("qwen2",
                        [](auto& m) {
                          m.config["attention_bias"] = true;
                          m.weights.tensor("model.layers.0.self_attn.o_proj.bias", {kHidden}, values(kHidden, 5));
                        }),
             {"o_proj.bias"});
}

TEST_CASE("a sliding window is a fact, by each family's rule") {
  const auto window = [](const char* family, const Json& keys) {
    const TempFolder folder;
    HfModel m = hf_model(family, true);
    m.config.erase("sliding_window");
    m.config.update(keys);
    const ModelFacts facts = open_hf(folder, m)->facts();
    CHECK(facts.to_json()["sliding_window"] == facts.sliding_window);
    return facts.sliding_window;
  };
  CHECK(window("mistral", {{"sliding_window", 64}}) == 64);
  CHECK(window("mistral", {{"sliding_window", nullptr}}) == 0);
  CHECK(window("mistral", Json::object()) == 4096);  // the default of its class
  CHECK(window("llama", {{"sliding_window", 64}}) == 0);
  CHECK(window("qwen2", {{"sliding_window", 64}}) == 0);  // use_sliding_window is off by default
  for (const char* family : {"qwen2", "qwen3"}) {
    const Json on{{"use_sliding_window", true}, {"sliding_window", 64}, {"max_window_layers", 1}};
    const auto with = [&](Json keys) {
      Json all = on;
      all.update(keys);
      return window(family, all);
    };
    CHECK(with(Json::object()) == 64);
    CHECK(with({{"max_window_layers", 2}}) == 0);
    CHECK(with({{"sliding_window", nullptr}}) == 0);
    CHECK(with({{"layer_types", {"full_attention", "sliding_attention"}}, {"max_window_layers", 2}}) == 64);
    CHECK(with({{"layer_types", {"full_attention", "full_attention"}}}) == 0);
    CHECK(window(family, {{"use_sliding_window", true}, {"max_window_layers", 0}}) == 4096);
  }
  const auto refused = [](const Json& keys) { return hf_refusal("qwen3", [&](auto& m) { m.config.update(keys); }); };
  check_says(refused({{"layer_types", {"full_attention", "sliding_attention"}}}),
             {"layer_types", "use_sliding_window"});
  check_says(refused({{"layer_types", {"full_attention"}}}), {"layer_types", "num_hidden_layers (2)"});
  check_says(refused({{"layer_types", {"full_attention", "chunked_attention"}}}), {"chunked_attention", "dump_hf.py"});

  const TempFolder folder;
  GgufBuilder b = gguf_model("llama", true);
  b.u32("llama.attention.sliding_window", 128);
  CHECK(ModelWeights::open(folder.write("m.gguf", b.build()))->facts().sliding_window == 128);
}

TEST_CASE("contexts are measured against the context length and the sliding window") {
  ModelFacts facts;
  facts.name = "m";
  facts.context_length = 256;
  CHECK(facts.longest_context() == 256);
  facts.sliding_window = 300;
  CHECK(facts.longest_context() == 256);
  facts.sliding_window = 64;
  CHECK(facts.longest_context() == 64);
  facts.require_context(64);
  CHECK_THROWS_WITH(facts.require_context(65), Catch::Contains("65") && Catch::Contains("sliding window of 64"));
  CHECK_THROWS_WITH(facts.require_context(257), Catch::Contains("beyond the model's 256"));
}

TEST_CASE("GGUF models that would compute something else are refused by name") {
  CHECK(gguf_refusal("llama", [](auto&) {}).empty());
  check_says(gguf_refusal("llama", [](auto& b) { b.value("general.architecture").payload = gguf_text("gemma2"); }),
             {"\"gemma2\"", "llama, qwen2, qwen3", "dump_hf.py"});
  check_says(gguf_refusal("llama", [](auto& b) { b.u32("llama.expert_count", 8); }), {"8 experts", "dump_hf.py"});
  check_says(gguf_refusal("llama", [](auto& b) { b.text("llama.rope.scaling.type", "longrope"); }), {"\"longrope\""});
  for (const char* kind : {"linear", "yarn"})
    check_says(gguf_refusal("llama", [&](auto& b) { b.text("llama.rope.scaling.type", kind); }),
               {"rope.scaling.factor", "missing", kind});
  check_says(
      gguf_refusal("llama", [](auto& b) { b.f32("llama.rope.scaling.factor", 4).f32("llama.rope.scale_linear", 2); }),
      {"rope.scaling.factor is 4", "rope.scale_linear is 2"});
  check_says(
      gguf_refusal("llama",
                   [](auto& b) { b.text("llama.rope.scaling.type", "none").f32("llama.rope.scaling.factor", 4); }),
      {"\"none\"", "factor 4"});
  check_says(gguf_refusal("llama", [](auto& b) { b.f32("llama.rope.scaling.alpha", 2); }), {"rope.scaling.alpha"});
  check_says(gguf_refusal("llama", [](auto& b) { b.f32("llama.rope.scaling.attn_factor", 0); }), {"attn_factor is 0"});
  for (const char* key : {"yarn_log_multiplier", "yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast"})
    check_says(gguf_refusal("llama",
                            [&](auto& b) {
                              b.text("llama.rope.scaling.type", "yarn").f32("llama.rope.scaling.factor", 4);
                              b.f32(std::string("llama.rope.scaling.") + key, 0.5f);
                            }),
               {key, "0.5"});
  check_says(gguf_refusal("llama", [](auto& b) { b.u32("llama.rope.dimension_count", 4); }), {"RoPE on 4 of 6"});
  check_says(gguf_refusal("llama", [](auto& b) { b.f32("llama.logit_scale", 2); }), {"llama.logit_scale"});
  check_says(gguf_refusal("llama", [](auto& b) { b.u32("split.count", 3); }), {"3 files"});
  check_says(gguf_refusal("llama",
                          [](auto& b) {
                            b.tensor("rope_freqs.weight", {2}, {1, 2});
                          }),
             {"rope_freqs.weight", "(2)", "(3)"});
  check_says(gguf_refusal("llama",
                          [](auto& b) {
                            b.tensor("rope_freqs.weight", {3}, {1, 0, 2});
                          }),
             {"rope_freqs.weight", "0"});
  check_says(gguf_refusal("llama", [](auto& b) { b.tensor("blk.0.attn_output.bias", {kHidden}, values(kHidden, 5)); }),
             {"blk.1.attn_output.bias is missing"});
  check_says(gguf_refusal("llama", [](auto& b) { b.tensor("blk.1.attn_norm.bias", {kHidden}, values(kHidden, 5)); }),
             {"blk.1.attn_norm.bias"});
  check_says(gguf_refusal("llama", [](auto& b) { b.drop("blk.1.ffn_up.weight"); }), {"blk.1.ffn_up.weight is missing"});
  check_says(gguf_refusal("qwen3", [](auto& b) { b.drop("blk.1.attn_q_norm.weight"); }),
             {"blk.1.attn_q_norm.weight is missing"});
  check_says(gguf_refusal("qwen2", [](auto& b) { b.drop("blk.1.attn_v.bias"); }), {"blk.1.attn_v.bias is missing"});
  check_says(gguf_refusal("llama",
                          [](auto& b) {
                            b.at("blk.0.attn_k.weight").shape = {6, 24};
                          }),
             {"blk.0.attn_k.weight", "(6, 24)", "(12, 12) expected"});
  check_says(gguf_refusal("llama", [](auto& b) { b.value("llama.block_count").payload = raw(uint32_t{3}); }),
             {"blk.2.attn_norm.weight is missing"});
  check_says(gguf_refusal("llama", [](auto& b) { b.value("llama.block_count").payload = raw(uint32_t{1}); }),
             {"blk.1.", "not part"});
  check_says(gguf_refusal("llama", [](auto& b) { b.value("llama.block_count").payload = raw(~uint32_t{0}); }),
             {"llama.block_count", "1 to 1024"});
  check_says(
      gguf_refusal("llama", [](auto& b) { b.value("llama.attention.head_count_kv").payload = raw(uint32_t{3}); }),
      {"4 query heads", "3 KV heads"});
  check_says(
      gguf_refusal("llama", [](auto& b) { b.value("llama.attention.layer_norm_rms_epsilon").payload = raw(-1.0f); }),
      {"epsilon"});
  check_says(gguf_refusal("llama", [](auto& b) { b.value("llama.rope.freq_base").payload = raw(0.0f); }),
             {"freq_base"});
  check_says(gguf_refusal("llama",
                          [](auto& b) {
                            b.drop("llama.attention.layer_norm_rms_epsilon");
                            b.f32("llama.attention.layer_norm_epsilon", 1e-5f);
                          }),
             {"LayerNorm"});
}

TEST_CASE("Hugging Face models that would compute something else are refused by name") {
  CHECK(hf_refusal("llama", [](auto&) {}).empty());
  CHECK(hf_refusal("mistral", [](auto&) {}).empty());
  const auto with = [](const char* family, const char* key, const Json& value) {
    return hf_refusal(family, [&](auto& m) { m.config[key] = value; });
  };
  check_says(with("llama", "model_type", "mixtral"), {"config.json", "\"mixtral\"", "mistral", "dump_hf.py"});
  check_says(with("llama", "attention_bias", true), {"self_attn.q_proj.bias is missing"});
  check_says(with("llama", "mlp_bias", true), {"mlp_bias", "dump_hf.py"});
  check_says(with("qwen2", "num_experts", 4), {"num_experts", "dump_hf.py"});
  check_says(with("llama", "hidden_act", "gelu"), {"hidden_act", "silu"});
  check_says(with("llama", "quantization_config", {{"bits", 4}}), {"quantization_config"});
  check_says(with("llama", "hidden_size", "12"), {"hidden_size", "an integer"});
  check_says(with("llama", "hidden_size", 12.5), {"hidden_size", "12.5"});
  check_says(with("llama", "hidden_size", -12), {"hidden_size", "-12"});
  check_says(with("llama", "hidden_size", 18446744073709551615u), {"hidden_size", "18446744073709551615"});
  check_says(with("llama", "hidden_size", 14), {"shape (11, 12), (11, 14) expected"});
  check_says(with("llama", "num_hidden_layers", 3), {"model.layers.2.", "missing"});
  check_says(with("llama", "head_dim", 5), {"head_dim is 5", "even"});
  check_says(with("llama", "vocab_size", nullptr), {"vocab_size", "missing"});
  check_says(with("llama", "tie_word_embeddings", false), {"lm_head.weight is missing", "tie_word_embeddings"});
  check_says(with("llama", "rms_norm_eps", 0), {"rms_norm_eps"});
  // Tensors.
  check_says(hf_refusal("llama",
                        [](auto& m) {
                          m.weights.tensor("model.layers.0.self_attn.o_proj.bias", {kHidden}, values(kHidden, 5));
                        }),
             {"o_proj.bias"});
  check_says(hf_refusal("llama", [](auto& m) { m.weights.header["model.norm.weight"]["dtype"] = "I32"; }),
             {"model.norm.weight", "I32"});
  // Files.
  const TempFolder folder;
  check_says(data_error_of([&] { ModelWeights::open(folder.path()); }), {"no config.json"});
  check_says(data_error_of([&] { ModelWeights::open(folder.file("nothing")); }), {"nothing", "no such"});
  folder.write("config.json", "[1]");
  folder.write("model.safetensors", hf_model("llama", true).weights.build());
  check_says(data_error_of([&] { ModelWeights::open(folder.path()); }), {"config.json", "not a JSON object"});
  folder.write("config.json", "{\"model_type\": \"llama\", \"model_type\": \"llama\"}");
  check_says(data_error_of([&] { ModelWeights::open(folder.path()); }), {"config.json", "stands twice"});
}
