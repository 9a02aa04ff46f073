// RoPE as model files write it, in all its places and spellings.
#include "model/model_files.h"

#include <cmath>
#include <functional>

#include "core/json.h"
#include "model/family_models.h"
#include "support/catch.h"
#include "support/model_writers.h"

using namespace vqkv;
using namespace vqkv::testing;

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
