#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>
#include <optional>
#include <set>

#include "core/error.h"
#include "core/json.h"
#include "io/atomic_file.h"
#include "io/ggml_dequant.h"
#include "io/safetensors.h"
#include "model/model_files_common.h"
#include "model/model_files_config.h"
#include "model/model_files_rope.h"

namespace vqkv::model_files {
namespace {

constexpr std::array<std::string_view, 4> kFamilies{"llama", "mistral", "qwen2", "qwen3"};
constexpr int64_t kMaxConfigBytes = 16 << 20;

// `prefix` stands before all but the head: "model.", or nothing in what a class without a head has saved.
std::string tensor_name(std::string_view prefix, Weight weight, int layer) {
  const auto of_layer = [&](std::string_view rest) { return fmt::format("{}layers.{}.{}", prefix, layer, rest); };
  switch (weight) {
    case Weight::kEmbedding:
      return fmt::format("{}embed_tokens.weight", prefix);
    case Weight::kHead:
      return "lm_head.weight";
    case Weight::kFinalNorm:
      return fmt::format("{}norm.weight", prefix);
    case Weight::kAttentionNorm:
      return of_layer("input_layernorm.weight");
    case Weight::kQ:
      return of_layer("self_attn.q_proj.weight");
    case Weight::kK:
      return of_layer("self_attn.k_proj.weight");
    case Weight::kV:
      return of_layer("self_attn.v_proj.weight");
    case Weight::kO:
      return of_layer("self_attn.o_proj.weight");
    case Weight::kQBias:
      return of_layer("self_attn.q_proj.bias");
    case Weight::kKBias:
      return of_layer("self_attn.k_proj.bias");
    case Weight::kVBias:
      return of_layer("self_attn.v_proj.bias");
    case Weight::kOBias:
      return of_layer("self_attn.o_proj.bias");
    case Weight::kQNorm:
      return of_layer("self_attn.q_norm.weight");
    case Weight::kKNorm:
      return of_layer("self_attn.k_norm.weight");
    case Weight::kFfnNorm:
      return of_layer("post_attention_layernorm.weight");
    case Weight::kGate:
      return of_layer("mlp.gate_proj.weight");
    case Weight::kUp:
      return of_layer("mlp.up_proj.weight");
    case Weight::kDown:
      return of_layer("mlp.down_proj.weight");
  }
  fail_internal("tensor_name: an unknown weight");
}

class HfWeights final : public ModelWeights {
 public:
  explicit HfWeights(const std::string& folder)
      : folder_(folder),
        config_text_(read_config(folder)),
        config_(parse_json(config_text_, config_path(folder)), config_path(folder)),
        files_(folder) {
    if (files_.find("norm.weight").tensor && !files_.find("model.norm.weight").tensor) prefix_.clear();
    read_facts();
    settle_head();
    check_tensors();
    facts_.parameters = count_parameters(facts_);
    std::vector<HashPart> parts{
        {"config.json", {reinterpret_cast<const uint8_t*>(config_text_.data()), config_text_.size()}}};
    for (const auto& file : files_.files()) parts.push_back({"safetensors", file->bytes()});
    facts_.hash = content_identity(parts);
  }

 protected:
  Stored stored(Weight weight, int layer) const override {
    const auto place = files_.find(name_of(weight, layer));
    VQKV_CHECK(place.tensor != nullptr);
    const GgmlType type = place.tensor->dtype == "F32"   ? GgmlType::kF32
                          : place.tensor->dtype == "F16" ? GgmlType::kF16
                                                         : GgmlType::kBF16;
    return {place.file->tensor_bytes(*place.tensor).data(), static_cast<uint32_t>(type), false,
            fmt::format("{}: tensor {}", place.file->path(), place.tensor->name)};
  }

 private:
  static std::string config_path(const std::string& folder) {
    return (std::filesystem::path(folder) / "config.json").string();
  }
  static std::string read_config(const std::string& folder) {
    std::error_code ignored;
    if (!std::filesystem::exists(config_path(folder), ignored))
      fail_data(fmt::format(
          "{}: no config.json: a model is a GGUF file or a Hugging Face folder with config.json and safetensors",
          folder));
    return read_file(config_path(folder), kMaxConfigBytes);
  }
  [[noreturn]] void refuse(const std::string& problem) const {
    fail_data(fmt::format("{}: {}", config_.where(), problem));
  }

  void read_facts();
  void refuse_other_mathematics() const;
  int64_t sliding_window() const;
  void settle_head();
  void check_frequencies(const std::string& name) const;
  void check_tensors() const;
  // The tensor that holds a weight.
  std::string name_of(Weight weight, int layer) const {
    return tensor_name(prefix_, weight == Weight::kEmbedding ? embedding_ : weight, layer);
  }

  std::string folder_, config_text_, prefix_ = "model.";
  Weight embedding_ = Weight::kEmbedding;  // kHead where only the head is stored, and tied
  Config config_;
  SafetensorsFolder files_;
};

void HfWeights::read_facts() {
  facts_.source = "hf";
  facts_.architecture = config_.string_or("model_type", "");
  if (std::find(kFamilies.begin(), kFamilies.end(), facts_.architecture) == kFamilies.end())
    refuse(fmt::format("model_type \"{}\" is not supported; supported are {}; {}", label(facts_.architecture),
                       fmt::join(kFamilies, ", "), kRecordInstead));
  const auto folder = std::filesystem::path(folder_).lexically_normal();
  facts_.name = label((folder.has_filename() ? folder : folder.parent_path()).filename().string());

  const auto count = [&](const char* key, int64_t highest) {
    return static_cast<int>(config_.integer(key, 1, highest));
  };
  facts_.layers = count("num_hidden_layers", kMaxLayers);
  facts_.hidden = count("hidden_size", kMaxHidden);
  facts_.ffn = count("intermediate_size", kMaxFfn);
  facts_.q_heads = count("num_attention_heads", kMaxHeads);
  // Llama's own default is one KV head a query head; the other families always write the key.
  facts_.kv_heads = facts_.architecture == "llama"
                        ? static_cast<int>(config_.integer_or("num_key_value_heads", 1, kMaxHeads, facts_.q_heads))
                        : count("num_key_value_heads", kMaxHeads);
  facts_.vocab = count("vocab_size", kMaxVocab);
  facts_.context_length = config_.integer("max_position_embeddings", 1, kMaxContext);
  facts_.norm_eps = config_.number_or("rms_norm_eps", 1e-12, 0.1, 1e-6);  // 1e-6: the default of all four families
  // Qwen3's default head_dim is 128 whatever the hidden size; the others divide.
  const int64_t default_dim = facts_.architecture == "qwen3" ? 128 : facts_.hidden / facts_.q_heads;
  if (!config_.has("head_dim") && facts_.architecture != "qwen3" && facts_.hidden % facts_.q_heads != 0)
    refuse(fmt::format("hidden_size {} is not a multiple of num_attention_heads {}, and head_dim is missing",
                       facts_.hidden, facts_.q_heads));
  facts_.head_dim = static_cast<int>(config_.integer_or("head_dim", 2, kMaxHeadDim, default_dim));
  facts_.tied_head = config_.boolean_or("tie_word_embeddings", false);
  facts_.qk_norm = facts_.architecture == "qwen3";
  // The class of Qwen2 always has three biases, Mistral's none; neither reads the key.
  facts_.o_bias = (facts_.architecture == "llama" || facts_.qk_norm) && config_.boolean_or("attention_bias", false);
  facts_.qkv_bias = facts_.architecture == "qwen2" || facts_.o_bias;
  refuse_other_mathematics();
  facts_.sliding_window = sliding_window();
  check_facts(config_.where(), facts_);
  facts_.rope = rope_of(config_, facts_.head_dim, facts_.context_length);
}

void HfWeights::refuse_other_mathematics() const {
  if (config_.has("quantization_config"))
    refuse("quantization_config: quantized safetensors are not supported; use the original weights or a GGUF");
  if (const std::string act = config_.string_or("hidden_act", "silu"); act != "silu" && act != "swish")
    config_.fail("hidden_act", fmt::format("only \"silu\" is supported; {}", kRecordInstead));
  if (facts_.architecture == "llama" && config_.boolean_or("mlp_bias", false))  // the other classes don't read the key
    config_.fail("mlp_bias", fmt::format("biases of the feed-forward part are not supported; {}", kRecordInstead));
  for (const auto* key : {"num_local_experts", "num_experts"})
    if (config_.has(key) && config_.integer(key, 0, 1 << 20) > 0)
      config_.fail(key, fmt::format("a mixture of experts is not supported; {}", kRecordInstead));
}

// Each family has its own rule for when a window counts (transformers' configuration classes).
int64_t HfWeights::sliding_window() const {
  // A key that is there and null turns the window off; a missing key means the classes' default of 4096.
  const auto window = [&] {
    return config_.says_null("sliding_window") ? 0 : config_.integer_or("sliding_window", 0, int64_t{1} << 40, 4096);
  };
  if (facts_.architecture == "mistral") return window();
  const bool may_slide = facts_.architecture != "llama" && config_.boolean_or("use_sliding_window", false);
  bool slides = may_slide && config_.integer_or("max_window_layers", 0, 1 << 20, 28) < facts_.layers;
  if (config_.has("layer_types")) {
    const Json& types = config_.at("layer_types");
    if (!types.is_array() || types.size() != static_cast<size_t>(facts_.layers))
      config_.fail("layer_types", fmt::format("a list of num_hidden_layers ({}) types is allowed", facts_.layers));
    slides = false;
    for (const Json& type : types) {
      slides = slides || type == "sliding_attention";
      if (type != "full_attention" && type != "sliding_attention")
        config_.fail("layer_types",
                     fmt::format("\"full_attention\" and \"sliding_attention\" are allowed; {}", kRecordInstead));
    }
    if (slides && !(may_slide && window() > 0))
      config_.fail(
          "layer_types",
          "layers of \"sliding_attention\" need use_sliding_window true and a sliding_window, in a family that "
          "has them (qwen2, qwen3)");
  }
  return slides ? window() : 0;
}

// Files may store the head beside tie_word_embeddings, or in the embedding's place. A head of other bytes is the one
// that was trained (transformers 5 takes it too, 4 ties over it).
void HfWeights::settle_head() {
  if (!facts_.tied_head) return;
  const auto embedding = files_.find(name_of(Weight::kEmbedding, 0)), head = files_.find(name_of(Weight::kHead, 0));
  if (!head.tensor) return;
  if (!embedding.tensor) {
    embedding_ = Weight::kHead;
    return;
  }
  facts_.tied_head =
      embedding.tensor->dtype == head.tensor->dtype &&
      std::ranges::equal(embedding.file->tensor_bytes(*embedding.tensor), head.file->tensor_bytes(*head.tensor));
}

// Files of 2023 store RoPE's frequencies, which follow from the configuration: a second copy of a fact.
void HfWeights::check_frequencies(const std::string& name) const {
  const auto [file, tensor] = files_.find(name);
  const std::vector<int64_t> expected{facts_.rope.rotary_dim / 2};
  if (tensor->shape != expected)
    fail_data(fmt::format("{}: tensor {} has shape ({}), ({}) expected", file->path(), name,
                          fmt::join(tensor->shape, ", "), expected[0]));
  std::vector<float> stored(static_cast<size_t>(expected[0]));
  file->read(*tensor, stored.data());
  const double precision = tensor->dtype == "F32" ? 0 : tensor->dtype == "F16" ? 0x1p-11 : 0x1p-9;
  check_stored_frequencies(fmt::format("{}: tensor {}", file->path(), name), stored, precision, facts_.rope);
}

void HfWeights::check_tensors() const {
  std::set<std::string> used;
  if (facts_.tied_head) used.insert(name_of(Weight::kHead, 0));  // some files store the tied copy too
  for (const Weight weight : weights_of(facts_)) {
    for (int layer = 0; layer < (belongs_to_layer(weight) ? facts_.layers : 1); ++layer) {
      const std::string name = name_of(weight, layer);
      const auto [file, tensor] = files_.find(name);
      if (!tensor)
        fail_data(fmt::format("{}: the tensor {} is missing{}", folder_, name,
                              weight == Weight::kHead ? " and tie_word_embeddings is not true in config.json" : ""));
      if (tensor->dtype != "F32" && tensor->dtype != "F16" && tensor->dtype != "BF16")
        fail_data(fmt::format("{}: tensor {} has dtype {}; F32, F16 and BF16 are supported", file->path(), name,
                              tensor->dtype));
      check_shape(file->path(), name, tensor->shape, facts_, weight);
      used.insert(name);
    }
  }
  for (const std::string& name : files_.names()) {
    if (used.contains(name)) continue;
    if (name.ends_with("rotary_emb.inv_freq")) {
      check_frequencies(name);
      continue;
    }
    fail_data(
        fmt::format("{}: the tensor {} is not part of a supported {} model (unsupported bias, norm or expert?); {}",
                    files_.find(name).file->path(), label(name), facts_.architecture, kRecordInstead));
  }
}

}  // namespace

std::unique_ptr<ModelWeights> open_hf(const std::string& folder) { return std::make_unique<HfWeights>(folder); }

}  // namespace vqkv::model_files
