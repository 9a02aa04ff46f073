// Small models of every family, as GGUF and as a Hugging Face folder, and what is refused.
#include "model/model_files.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>

#include "core/error.h"
#include "core/json.h"
#include "support/catch.h"
#include "support/model_writers.h"

using namespace vqkv;
using namespace vqkv::testing;

namespace {

constexpr int kLayers = 2, kHidden = 12, kQ = 4, kKv = 2, kDim = 6, kFfn = 20, kVocab = 11;

// The value of element i of tensor `seed`: distinct, exact in fp32.
std::vector<float> values(int64_t n, int seed) {
  std::vector<float> v(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) v[static_cast<size_t>(i)] = static_cast<float>(seed * 1000 + i) / 64;
  return v;
}

// As ggml's llama files store query and key rows: (head, pair, half) from (head, half, pair).
std::vector<float> interleave(const std::vector<float>& v, int heads, int64_t cols) {
  std::vector<float> out(v.size());
  for (int h = 0; h < heads; ++h)
    for (int s = 0; s < 2; ++s)
      for (int i = 0; i < kDim / 2; ++i)
        for (int64_t c = 0; c < cols; ++c)
          out[static_cast<size_t>((h * kDim + 2 * i + s) * cols + c)] =
              v[static_cast<size_t>((h * kDim + s * (kDim / 2) + i) * cols + c)];
  return out;
}

struct Named {
  const char *gguf, *hf;
  int rows, cols;
  bool q, k;
};
std::vector<Named> layer_tensors(const std::string& family) {
  std::vector<Named> t{{"attn_norm.weight", "input_layernorm.weight", 1, kHidden, false, false},
                       {"attn_q.weight", "self_attn.q_proj.weight", kQ * kDim, kHidden, true, false},
                       {"attn_k.weight", "self_attn.k_proj.weight", kKv * kDim, kHidden, false, true},
                       {"attn_v.weight", "self_attn.v_proj.weight", kKv * kDim, kHidden, false, false},
                       {"attn_output.weight", "self_attn.o_proj.weight", kHidden, kQ * kDim, false, false},
                       {"ffn_norm.weight", "post_attention_layernorm.weight", 1, kHidden, false, false},
                       {"ffn_gate.weight", "mlp.gate_proj.weight", kFfn, kHidden, false, false},
                       {"ffn_up.weight", "mlp.up_proj.weight", kFfn, kHidden, false, false},
                       {"ffn_down.weight", "mlp.down_proj.weight", kHidden, kFfn, false, false}};
  if (family == "qwen2" || family.ends_with("+bias")) {
    t.push_back({"attn_q.bias", "self_attn.q_proj.bias", 1, kQ * kDim, true, false});
    t.push_back({"attn_k.bias", "self_attn.k_proj.bias", 1, kKv * kDim, false, true});
    t.push_back({"attn_v.bias", "self_attn.v_proj.bias", 1, kKv * kDim, false, false});
  }
  if (family.ends_with("+bias")) t.push_back({"attn_output.bias", "self_attn.o_proj.bias", 1, kHidden, false, false});
  if (family.starts_with("qwen3")) {
    t.push_back({"attn_q_norm.weight", "self_attn.q_norm.weight", 1, kDim, false, false});
    t.push_back({"attn_k_norm.weight", "self_attn.k_norm.weight", 1, kDim, false, false});
  }
  return t;
}

std::vector<int64_t> shape(const Named& t) {
  return t.rows == 1 ? std::vector<int64_t>{t.cols} : std::vector<int64_t>{t.rows, t.cols};
}

GgufBuilder gguf_model(const std::string& family, bool tied) {
  const bool llama = family.starts_with("llama");
  const std::string arch = family.substr(0, family.find('+'));
  GgufBuilder b;
  b.text("general.architecture", arch).text("general.name", "tiny");
  b.u32(arch + ".block_count", kLayers)
      .u32(arch + ".embedding_length", kHidden)
      .u32(arch + ".feed_forward_length", kFfn);
  b.u32(arch + ".attention.head_count", kQ)
      .u32(arch + ".attention.head_count_kv", kKv)
      .u32(arch + ".context_length", 256);
  b.u32(arch + ".attention.key_length", kDim).u32(arch + ".attention.value_length", kDim);
  b.f32(arch + ".attention.layer_norm_rms_epsilon", 1e-6f).f32(arch + ".rope.freq_base", 50000);
  b.tensor("token_embd.weight", {kVocab, kHidden}, values(kVocab * kHidden, 1));
  b.tensor("output_norm.weight", {kHidden}, values(kHidden, 2));
  if (!tied) b.tensor("output.weight", {kVocab, kHidden}, values(kVocab * kHidden, 3));
  for (int layer = 0; layer < kLayers; ++layer) {
    int seed = 10 + 20 * layer;
    for (const Named& t : layer_tensors(family)) {
      std::vector<float> v = values(t.rows * t.cols, seed++);
      if (llama && (t.q || t.k)) v = interleave(v, t.q ? kQ : kKv, t.rows == 1 ? 1 : t.cols);
      b.tensor("blk." + std::to_string(layer) + "." + t.gguf, shape(t), v);
    }
  }
  return b;
}

struct HfModel {
  Json config;
  SafetensorsBuilder weights;
};
HfModel hf_model(const std::string& family, bool tied) {
  HfModel m;
  m.config = {{"model_type", family.substr(0, family.find('+'))},
              {"num_hidden_layers", kLayers},
              {"hidden_size", kHidden},
              {"intermediate_size", kFfn},
              {"num_attention_heads", kQ},
              {"num_key_value_heads", kKv},
              {"head_dim", kDim},
              {"vocab_size", kVocab},
              {"max_position_embeddings", 256},
              {"rms_norm_eps", 1e-6},
              {"rope_theta", 50000.0},
              {"hidden_act", "silu"},
              {"tie_word_embeddings", tied},
              {"attention_bias", family.ends_with("+bias")},
              {"sliding_window", nullptr}};
  m.weights.tensor("model.embed_tokens.weight", {kVocab, kHidden}, values(kVocab * kHidden, 1));
  m.weights.tensor("model.norm.weight", {kHidden}, values(kHidden, 2));
  if (!tied) m.weights.tensor("lm_head.weight", {kVocab, kHidden}, values(kVocab * kHidden, 3));
  for (int layer = 0; layer < kLayers; ++layer) {
    int seed = 10 + 20 * layer;
    for (const Named& t : layer_tensors(family))
      m.weights.tensor("model.layers." + std::to_string(layer) + "." + t.hf, shape(t), values(t.rows * t.cols, seed++));
  }
  return m;
}

std::unique_ptr<ModelWeights> open_hf(const TempFolder& folder, const HfModel& m) {
  folder.write("config.json", m.config.dump());
  folder.write("model.safetensors", m.weights.build());
  return ModelWeights::open(folder.path());
}

std::string refusal(const std::function<void()>& f) {
  try {
    f();
  } catch (const Error& e) {
    CHECK(e.kind() == ErrorKind::kBadData);
    return e.what();
  }
  return "";
}
std::string gguf_refusal(const std::string& family, const std::function<void(GgufBuilder&)>& change) {
  const TempFolder folder;
  GgufBuilder b = gguf_model(family, true);
  change(b);
  const std::string path = folder.write("m.gguf", b.build());
  return refusal([&] { ModelWeights::open(path); });
}
std::string hf_refusal(const std::string& family, const std::function<void(HfModel&)>& change) {
  const TempFolder folder;
  HfModel m = hf_model(family, true);
  change(m);
  return refusal([&] { open_hf(folder, m); });
}
void check_says(const std::string& message, std::initializer_list<const char*> parts) {
  INFO("message: " << message);
  CHECK_FALSE(message.empty());
  for (const char* part : parts) CHECK(message.find(part) != std::string::npos);
}

constexpr Weight kAll[] = {Weight::kEmbedding, Weight::kHead,    Weight::kFinalNorm, Weight::kAttentionNorm,
                           Weight::kQ,         Weight::kK,       Weight::kV,         Weight::kO,
                           Weight::kQBias,     Weight::kKBias,   Weight::kVBias,     Weight::kQNorm,
                           Weight::kKNorm,     Weight::kFfnNorm, Weight::kGate,      Weight::kUp,
                           Weight::kDown,      Weight::kOBias};

}  // namespace

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
  check_says(refusal([&] { open_hf(folder, m); }), {"model.embed_tokens.weight is missing"});
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
  check_says(refusal([&] { open_hf(folder, m); }), {"lm_head.weight is missing"});
  m = hf_model("llama", true);
  m.weights.tensor("norm.weight", {kHidden}, values(kHidden, 2));  // both forms at once
  check_says(refusal([&] { open_hf(folder, m); }), {"norm.weight", "not part"});
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

TEST_CASE("RoPE of the model files") {
  const TempFolder folder;
  GgufBuilder b = gguf_model("llama", true);
  b.tensor("rope_freqs.weight", {kDim / 2}, {1, 2, 8});
  const RopeFacts factors = ModelWeights::open(folder.write("m.gguf", b.build()))->facts().rope;
  const RopeFacts plain = RopeFacts::plain(kDim, kDim, 50000);
  CHECK(factors.scaling == "factors");
  for (size_t p = 0; p < 3; ++p)
    CHECK(factors.inverse_frequency[p] == plain.inverse_frequency[p] / (p == 0 ? 1 : p == 1 ? 2 : 8));
  b = gguf_model("qwen2", true);
  b.text("qwen2.rope.scaling.type", "linear").f32("qwen2.rope.scaling.factor", 4);
  CHECK(ModelWeights::open(folder.write("m.gguf", b.build()))->facts().rope.inverse_frequency[1] ==
        plain.inverse_frequency[1] / 4);

  HfModel m = hf_model("llama", true);
  const Json llama3{{"rope_type", "llama3"},
                    {"factor", 8.0},
                    {"low_freq_factor", 1.0},
                    {"high_freq_factor", 4.0},
                    {"original_max_position_embeddings", 64}};
  RopeFacts expected = plain;
  expected.apply_llama3(8, 1, 4, 64);
  m.config["rope_scaling"] = llama3;
  CHECK(open_hf(folder, m)->facts().rope.inverse_frequency == expected.inverse_frequency);
  m.config["rope_scaling"] = nullptr;
  m.config["rope_parameters"] = llama3;
  m.config["rope_parameters"]["rope_theta"] = 50000.0;
  m.config.erase("rope_theta");
  CHECK(open_hf(folder, m)->facts().rope.inverse_frequency == expected.inverse_frequency);
  m.config["rope_parameters"] = {{"rope_type", "default"}, {"rope_theta", 50000.0}};
  CHECK(open_hf(folder, m)->facts().rope.inverse_frequency == plain.inverse_frequency);
}

TEST_CASE("RoPE in two spellings: equal facts pass") {
  const auto rope = [](const Json& keys) {
    const TempFolder folder;
    HfModel m = hf_model("llama", true);
    m.config.erase("rope_theta");
    m.config.update(keys);
    return open_hf(folder, m)->facts().rope.to_json();
  };
  const Json linear{{"rope_type", "linear"}, {"factor", 4.0}}, theta{{"rope_theta", 50000}};
  const auto both = [](Json a, const Json& b) {
    a.update(b);
    return a;
  };
  RopeFacts expected = RopeFacts::plain(kDim, kDim, 50000);
  CHECK(rope(theta) == expected.to_json());
  CHECK(rope({{"rope_parameters", theta}}) == expected.to_json());
  CHECK(rope({{"rope_parameters", both(theta, {{"type", "default"}})}, {"rope_theta", 50000.0}}) == expected.to_json());
  CHECK(rope({{"rope_scaling", nullptr}, {"rope_parameters", theta}}) == expected.to_json());
  expected.apply_linear(4);
  CHECK(rope(both(theta, {{"rope_scaling", linear}})) == expected.to_json());
  CHECK(rope(both(theta, {{"rope_scaling", {{"type", "linear"}, {"factor", 4}}}})) == expected.to_json());
  CHECK(rope(both(theta, {{"rope_scaling", both(linear, {{"type", "linear"}})}})) == expected.to_json());
  CHECK(rope({{"rope_scaling", both(linear, theta)}}) == expected.to_json());
  CHECK(rope({{"rope_parameters", both(linear, theta)}}) == expected.to_json());
  CHECK(rope({{"rope_parameters", both(linear, theta)}, {"rope_scaling", linear}, {"rope_theta", 50000}}) ==
        expected.to_json());
  CHECK(rope({{"rope_parameters", theta}, {"rope_scaling", linear}}) == expected.to_json());
}

TEST_CASE("RoPE in two spellings: contradictions and kinds that are not supported are refused by name") {
  const auto refused = [](const Json& keys) { return hf_refusal("llama", [&](auto& m) { m.config.update(keys); }); };
  const auto linear = [](double factor) { return Json{{"rope_type", "linear"}, {"factor", factor}}; };
  check_says(refused({{"rope_parameters", {{"rope_theta", 10000.0}}}}),
             {"config.json", "\"rope_theta\" is 50000.0", "rope_parameters says 10000.0"});
  check_says(refused({{"rope_scaling", {{"rope_theta", 10000.0}, {"type", "default"}}}}), {"rope_theta", "10000.0"});
  check_says(refused({{"rope_parameters", linear(4)}, {"rope_scaling", linear(2)}}),
             {"rope_scaling: \"factor\" is 2.0", "rope_parameters says 4.0"});
  check_says(refused({{"rope_parameters", {{"rope_type", "default"}}}, {"rope_scaling", linear(2)}}),
             {"\"linear\"", "rope_parameters", "\"default\""});
  check_says(refused({{"rope_scaling", {{"rope_type", "linear"}, {"type", "yarn"}, {"factor", 2.0}}}}),
             {"\"yarn\"", "\"linear\""});
  check_says(
      refused({{"original_max_position_embeddings", 32},
               {"rope_scaling", {{"rope_type", "yarn"}, {"factor", 4.0}, {"original_max_position_embeddings", 64}}}}),
      {"original_max_position_embeddings", "32", "64"});
  for (const char* place : {"rope_scaling", "rope_parameters"}) {
    for (const char* kind : {"dynamic", "longrope", "su", "mrope", "proportional", ""})
      for (const char* spelling : {"type", "rope_type"}) {
        check_says(refused({{place, {{spelling, kind}, {"factor", 4.0}}}}),
                   {place, spelling, kind, "yarn are supported", "dump_hf.py"});
        // also beside a kind that is supported
        const char* other = std::string(place) == "rope_scaling" ? "rope_parameters" : "rope_scaling";
        check_says(refused({{place, {{spelling, kind}, {"factor", 4.0}}}, {other, linear(4)}}), {place, spelling});
      }
    check_says(refused({{place, {{"rope_type", "default"}, {"mrope_section", {1, 1, 1}}}}}), {place, "mrope_section"});
    check_says(refused({{place, {{"rope_theta", 50000.0}, {"short_factor", {1.0}}}}}), {place, "short_factor"});
    check_says(refused({{place, {{"full_attention", {{"rope_theta", 50000.0}}}}}}), {place, "full_attention"});
    check_says(refused({{place, Json::object()}}), {std::string(place).c_str(), "is {}", "null"});
    check_says(refused({{place, {{"factor", 4.0}}}}), {place, "\"factor\" is 4.0", "rope_type", "missing"});
    check_says(refused({{place, {{"rope_type", "llama3"}, {"factor", 4.0}}}}), {"low_freq_factor", "missing"});
    check_says(refused({{place, {{"rope_type", "yarn"}}}}), {"factor", "missing", "yarn"});
    check_says(refused({{place, {{"rope_type", 3}}}}), {"rope_type", "a string"});
    check_says(refused({{place, {{"partial_rotary_factor", 0.5}}}}), {place, "partial_rotary_factor", "0.5"});
    check_says(refused({{place, 3}}), {place, "an object"});
  }
  check_says(refused({{"partial_rotary_factor", 0.5}}), {"partial_rotary_factor", "0.5"});
  check_says(refused({{"partial_rotary_factor", 1.0}, {"rope_parameters", {{"partial_rotary_factor", 0.5}}}}),
             {"partial_rotary_factor", "0.5"});
  check_says(refused({{"rope_theta", 1.0}, {"rope_scaling", {{"rope_type", "yarn"}, {"factor", 4.0}}}}),
             {"rope_theta", "more than 1"});
  check_says(refused({{"rope_scaling", {{"rope_type", "yarn"}, {"factor", 4.0}, {"beta_fast", 1}}}}),
             {"beta_fast (1)", "beta_slow (1)"});
}

TEST_CASE("YaRN of a folder and of a GGUF, with its factors") {
  const auto folder_rope = [](const Json& scaling) {
    const TempFolder folder;
    HfModel m = hf_model("llama", true);
    m.config["rope_scaling"] = scaling;
    return open_hf(folder, m)->facts().rope;
  };
  const Json yarn{{"rope_type", "yarn"}, {"factor", 4.0}, {"original_max_position_embeddings", 64}};
  const auto with = [&](const Json& more) {
    Json all = yarn;
    all.update(more);
    return folder_rope(all);
  };
  const RopeFacts rope = folder_rope(yarn);
  CHECK(rope.scaling == "yarn");
  CHECK(rope.attention_factor == Approx(0.1 * std::log(4.0) + 1).epsilon(1e-12));
  // Turns within 64 tokens at theta 50000 over 6 channels: pairs 0, 1, 2 turn 10.2, .276, .0075 times. The ramp runs
  // from 0 (32 turns would be pair -.32) to 1 (one turn is pair .64).
  const RopeFacts plain = RopeFacts::plain(kDim, kDim, 50000);
  CHECK(rope.inverse_frequency[0] == plain.inverse_frequency[0]);
  for (size_t p : {1, 2}) CHECK(rope.inverse_frequency[p] == plain.inverse_frequency[p] / 4);
  const RopeFacts whole = with({{"truncate", false}});
  CHECK(whole.inverse_frequency[0] == plain.inverse_frequency[0]);
  CHECK(with({{"attention_factor", 0.5}}).attention_factor == 0.5);
  CHECK(with({{"mscale", 2.0}}).attention_factor == rope.attention_factor);  // counts with mscale_all_dim alone
  CHECK(with({{"mscale", 2.0}, {"mscale_all_dim", 0.5}}).attention_factor ==
        Approx((0.2 * std::log(4.0) + 1) / (0.05 * std::log(4.0) + 1)).epsilon(1e-12));
  CHECK(with({{"original_max_position_embeddings", nullptr}}).inverse_frequency ==
        with({{"original_max_position_embeddings", 256}}).inverse_frequency);  // of max_position_embeddings
  CHECK(with({{"beta_fast", 0}, {"beta_slow", nullptr}}).inverse_frequency == rope.inverse_frequency);
  const RopeFacts narrow = with({{"beta_fast", 0.5}, {"beta_slow", 0.01}, {"truncate", false}});
  CHECK(narrow.inverse_frequency[1] < plain.inverse_frequency[1]);
  CHECK(narrow.inverse_frequency[1] > plain.inverse_frequency[1] / 4);

  const TempFolder folder;
  const auto gguf_rope = [&](const std::function<void(GgufBuilder&)>& change) {
    GgufBuilder b = gguf_model("llama", true);
    b.text("llama.rope.scaling.type", "yarn").f32("llama.rope.scaling.factor", 4);
    b.u32("llama.rope.scaling.original_context_length", 64);
    change(b);
    return ModelWeights::open(folder.write("m.gguf", b.build()))->facts().rope;
  };
  CHECK(gguf_rope([](auto&) {}).to_json() == rope.to_json());
  CHECK(gguf_rope([](auto& b) { b.f32("llama.rope.scaling.attn_factor", 0.5); }).attention_factor ==
        rope.attention_factor / 2);
  CHECK(gguf_rope([&](auto& b) {
          b.f32("llama.rope.scaling.yarn_attn_factor", static_cast<float>(rope.attention_factor));
          b.f32("llama.rope.scaling.yarn_ext_factor", 1).f32("llama.rope.scaling.yarn_log_multiplier", 0);
        }).to_json() == rope.to_json());
  CHECK(gguf_rope([](auto& b) {
          b.f32("llama.rope.scaling.yarn_beta_fast", 0.5).f32("llama.rope.scaling.yarn_beta_slow", 0.25);
        }).inverse_frequency == with({{"beta_fast", 0.5}, {"beta_slow", 0.25}}).inverse_frequency);
}

TEST_CASE("stored RoPE frequencies are compared with the configuration's") {
  const std::string name = "model.layers.0.self_attn.rotary_emb.inv_freq";
  const auto refused = [&](const std::vector<float>& stored, const Json& keys = Json::object()) {
    return hf_refusal("llama", [&](auto& m) {
      m.config.update(keys);
      m.weights.tensor(name, {static_cast<int64_t>(stored.size())}, stored);
    });
  };
  const RopeFacts plain = RopeFacts::plain(kDim, kDim, 50000);
  const std::vector<float> right(plain.inverse_frequency.begin(), plain.inverse_frequency.end());
  std::vector<float> scaled = right;
  for (float& f : scaled) f /= 4;
  const Json linear{{"rope_scaling", {{"type", "linear"}, {"factor", 4.0}}}};
  CHECK(refused(right).empty());
  CHECK(refused(right, linear).empty());  // scaled when used, as such files mean it
  CHECK(refused(scaled, linear).empty());
  check_says(refused(scaled), {"inv_freq", "frequency 0 is 0.25", "rope_theta 50000", "which is right?"});
  check_says(refused(right, {{"rope_theta", 10000.0}}), {"inv_freq", "frequency 1", "rope_theta 10000"});
  check_says(refused({1, 2}), {"inv_freq", "(2)", "(3) expected"});
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
  check_says(refusal([&] { ModelWeights::open(folder.path()); }), {"no config.json"});
  check_says(refusal([&] { ModelWeights::open(folder.file("nothing")); }), {"nothing", "no such"});
  folder.write("config.json", "[1]");
  folder.write("model.safetensors", hf_model("llama", true).weights.build());
  check_says(refusal([&] { ModelWeights::open(folder.path()); }), {"config.json", "not a JSON object"});
  folder.write("config.json", "{\"model_type\": \"llama\", \"model_type\": \"llama\"}");
  check_says(refusal([&] { ModelWeights::open(folder.path()); }), {"config.json", "stands twice"});
}
