#include <fmt/format.h>
#include <fmt/ranges.h>

#include <array>
#include <cmath>
#include <filesystem>
#include <set>
#include <string>

#include "core/error.h"
#include "io/gguf.h"
#include "model/model_files_common.h"

namespace vqkv::model_files {
namespace {

constexpr std::array<std::string_view, 3> kArchitectures{"llama", "qwen2", "qwen3"};

std::string tensor_name(Weight weight, int layer) {
  const auto of_layer = [layer](std::string_view rest) { return fmt::format("blk.{}.{}", layer, rest); };
  switch (weight) {
    case Weight::kEmbedding:
      return "token_embd.weight";
    case Weight::kHead:
      return "output.weight";
    case Weight::kFinalNorm:
      return "output_norm.weight";
    case Weight::kAttentionNorm:
      return of_layer("attn_norm.weight");
    case Weight::kQ:
      return of_layer("attn_q.weight");
    case Weight::kK:
      return of_layer("attn_k.weight");
    case Weight::kV:
      return of_layer("attn_v.weight");
    case Weight::kO:
      return of_layer("attn_output.weight");
    case Weight::kQBias:
      return of_layer("attn_q.bias");
    case Weight::kKBias:
      return of_layer("attn_k.bias");
    case Weight::kVBias:
      return of_layer("attn_v.bias");
    case Weight::kOBias:
      return of_layer("attn_output.bias");
    case Weight::kQNorm:
      return of_layer("attn_q_norm.weight");
    case Weight::kKNorm:
      return of_layer("attn_k_norm.weight");
    case Weight::kFfnNorm:
      return of_layer("ffn_norm.weight");
    case Weight::kGate:
      return of_layer("ffn_gate.weight");
    case Weight::kUp:
      return of_layer("ffn_up.weight");
    case Weight::kDown:
      return of_layer("ffn_down.weight");
  }
  fail_internal("tensor_name: an unknown weight");
}

class GgufWeights final : public ModelWeights {
 public:
  explicit GgufWeights(const std::string& path) : file_(path) {
    read_facts();
    check_tensors();
    facts_.parameters = count_parameters(facts_);
    const HashPart whole{"gguf", file_.bytes()};
    facts_.hash = content_identity({&whole, 1});
  }

 protected:
  Stored stored(Weight weight, int layer) const override {
    const GgufTensor* tensor = file_.find_tensor(tensor_name(weight, layer));
    VQKV_CHECK(tensor != nullptr);
    const bool rotated =
        weight == Weight::kQ || weight == Weight::kK || weight == Weight::kQBias || weight == Weight::kKBias;
    return {file_.tensor_bytes(*tensor).data(), static_cast<uint32_t>(tensor->type),
            rotated && facts_.architecture == "llama", fmt::format("{}: tensor {}", file_.path(), tensor->name)};
  }

 private:
  std::string key(std::string_view rest) const { return fmt::format("{}.{}", facts_.architecture, rest); }
  [[noreturn]] void refuse(const std::string& problem) const {
    fail_data(fmt::format("{}: {}", file_.path(), problem));
  }
  // Of mathematics that the runtime doesn't have.
  [[noreturn]] void refuse_model(const std::string& problem) const {
    refuse(fmt::format("{}; {} (from its original weights)", problem, kRecordInstead));
  }

  void read_facts();
  void read_rope();
  void read_yarn(double factor);
  void refuse_other_mathematics() const;
  void check_tensors() const;

  GgufFile file_;
};

void GgufWeights::read_facts() {
  facts_.source = "gguf";
  facts_.architecture = std::string(file_.string("general.architecture"));
  bool known = false;
  for (const auto name : kArchitectures) known = known || facts_.architecture == name;
  if (!known)
    refuse_model(fmt::format("the architecture \"{}\" is not supported; supported are {}", label(facts_.architecture),
                             fmt::join(kArchitectures, ", ")));
  if (file_.integer_or("split.count", 0, 65535, 0) > 1)
    refuse(fmt::format("one part of a model split into {} files; merge them into one GGUF first",
                       file_.integer("split.count", 0, 65535)));
  const std::string_view type = file_.string_or("general.type", "model");
  if (type != "model") refuse(fmt::format("general.type is \"{}\", \"model\" expected", label(type)));
  facts_.name = label(file_.string_or("general.name", ""));
  if (facts_.name.empty()) facts_.name = label(std::filesystem::path(file_.path()).stem().string());

  const auto count = [&](std::string_view rest, int64_t highest) {
    return static_cast<int>(file_.integer(key(rest), 1, highest));
  };
  facts_.layers = count("block_count", kMaxLayers);
  facts_.hidden = count("embedding_length", kMaxHidden);
  facts_.ffn = count("feed_forward_length", kMaxFfn);
  facts_.q_heads = count("attention.head_count", kMaxHeads);
  facts_.kv_heads = static_cast<int>(file_.integer_or(key("attention.head_count_kv"), 1, kMaxHeads, facts_.q_heads));
  facts_.context_length = file_.integer(key("context_length"), 1, kMaxContext);
  if (!file_.has(key("attention.layer_norm_rms_epsilon")) && file_.has(key("attention.layer_norm_epsilon")))
    refuse_model("the model uses LayerNorm; only RMS norm is supported");
  // Files hold the epsilon as f32: 1e-5 reads back as 9.99999974738e-06. The shortest decimal of that f32 is what was
  // meant, and what the Hugging Face folder of the same model says.
  facts_.norm_eps =
      std::stod(fmt::format("{}", static_cast<float>(file_.number(key("attention.layer_norm_rms_epsilon")))));
  const bool divides = facts_.hidden % facts_.q_heads == 0;
  if (!divides && !file_.has(key("attention.key_length")))
    refuse(fmt::format("{} is missing, and the hidden size {} is not a multiple of {} heads",
                       key("attention.key_length"), facts_.hidden, facts_.q_heads));
  facts_.head_dim =
      static_cast<int>(file_.integer_or(key("attention.key_length"), 2, kMaxHeadDim, facts_.hidden / facts_.q_heads));
  const int64_t value_dim = file_.integer_or(key("attention.value_length"), 1, kMaxHeadDim, facts_.head_dim);
  if (value_dim != facts_.head_dim)
    refuse_model(
        fmt::format("values of {} channels and keys of {}; equal sizes are supported", value_dim, facts_.head_dim));

  const GgufTensor* embedding = file_.find_tensor("token_embd.weight");
  if (!embedding) refuse("the tensor token_embd.weight is missing");
  facts_.vocab = static_cast<int>(std::min<int64_t>(embedding->shape.front(), kMaxVocab + 1));
  const int64_t said = file_.integer_or(key("vocab_size"), 1, kMaxVocab, facts_.vocab);
  if (said != facts_.vocab)
    refuse(fmt::format("{} is {}, token_embd.weight has {} rows", key("vocab_size"), said, facts_.vocab));
  facts_.tied_head = file_.find_tensor("output.weight") == nullptr;
  facts_.qkv_bias = facts_.architecture == "qwen2" || file_.find_tensor("blk.0.attn_q.bias") != nullptr;
  facts_.o_bias = file_.find_tensor("blk.0.attn_output.bias") != nullptr;
  facts_.qk_norm = facts_.architecture == "qwen3";
  facts_.sliding_window = file_.integer_or(key("attention.sliding_window"), 0, int64_t{1} << 40, 0);
  refuse_other_mathematics();
  check_facts(file_.path(), facts_);
  read_rope();
}

void GgufWeights::refuse_other_mathematics() const {
  if (const int64_t experts = file_.integer_or(key("expert_count"), 0, 1 << 20, 0); experts > 0)
    refuse_model(fmt::format("a mixture of {} experts ({}) is not supported", experts, key("expert_count")));
  if (!file_.boolean_or(key("attention.causal"), true))
    refuse_model(fmt::format("{} is false; only causal attention is supported", key("attention.causal")));
  // Keys of related families that change the result; 0 means off in all of them.
  for (const auto rest : {"attention.clamp_kqv", "attention.max_alibi_bias", "attention.scale", "logit_scale",
                          "residual_scale", "embedding_scale", "attn_logit_softcapping", "final_logit_softcapping"})
    if (const double value = file_.number_or(key(rest), 0); value != 0)
      refuse_model(fmt::format("{} is {}, which is not supported", key(rest), value));
}

void GgufWeights::read_rope() {
  const int64_t rotary = file_.integer_or(key("rope.dimension_count"), 1, kMaxHeadDim, facts_.head_dim);
  if (rotary != facts_.head_dim)
    refuse_model(fmt::format("RoPE on {} of {} channels ({}) is not supported", rotary, facts_.head_dim,
                             key("rope.dimension_count")));
  const double theta = file_.number_or(key("rope.freq_base"), 10000.0);
  if (!(theta >= 1 && theta <= kMaxTheta))
    refuse(fmt::format("{} is {}, 1 to {} are allowed", key("rope.freq_base"), theta, kMaxTheta));
  facts_.rope = RopeFacts::plain(facts_.head_dim, facts_.head_dim, theta);

  // Files of 2023 give a linear factor without naming the kind, and under a name of its own.
  const std::string factor_key = key("rope.scaling.factor"), old_key = key("rope.scale_linear");
  const double factor = file_.number_or(factor_key, file_.number_or(old_key, 1));
  if (!(factor >= 1 && factor <= 1e6))
    refuse(fmt::format("{} is {}, 1 to 1e6 are allowed", file_.has(factor_key) ? factor_key : old_key, factor));
  if (const double old = file_.number_or(old_key, factor); old != factor)
    refuse(fmt::format("{} is {} and {} is {}: which is right?", factor_key, factor, old_key, old));
  const bool scaled = file_.has(factor_key) || file_.has(old_key);
  const std::string_view kind = file_.string_or(key("rope.scaling.type"), scaled ? "linear" : "none");
  if (kind != "none" && kind != "linear" && kind != "yarn")
    refuse_model(fmt::format(
        "RoPE scaling \"{}\" is not supported; supported are none, linear, yarn and a rope_freqs tensor", label(kind)));
  if (kind == "none" && factor != 1)
    refuse(fmt::format("{} is \"none\" and the factor {}: which is right?", key("rope.scaling.type"), factor));
  if (kind != "none" && !scaled) refuse(fmt::format("{} is missing, which \"{}\" needs", factor_key, kind));
  if (kind == "linear" && factor != 1) facts_.rope.apply_linear(factor);
  if (kind == "yarn") read_yarn(factor);
  if (const double alpha = file_.number_or(key("rope.scaling.alpha"), 0); alpha != 0)
    refuse_model(fmt::format("{} is {}, which is not supported", key("rope.scaling.alpha"), alpha));
  const double attention = file_.number_or(key("rope.scaling.attn_factor"), 1);
  if (!(attention >= 1e-3 && attention <= 1e3))
    refuse(fmt::format("{} is {}, 0.001 to 1000 are allowed", key("rope.scaling.attn_factor"), attention));
  facts_.rope.attention_factor *= attention;

  const GgufTensor* tensor = file_.find_tensor("rope_freqs.weight");
  if (!tensor) return;
  if (tensor->type != GgmlType::kF32 || tensor->shape != std::vector<int64_t>{facts_.head_dim / 2})
    refuse(fmt::format("tensor rope_freqs.weight has type {} and shape ({}), F32 and ({}) expected",
                       ggml_type_facts(tensor->type).name, fmt::join(tensor->shape, ", "), facts_.head_dim / 2));
  std::vector<float> factors(static_cast<size_t>(facts_.head_dim / 2));
  ggml_dequantize(GgmlType::kF32, file_.tensor_bytes(*tensor).data(), factors.data(), tensor->elements());
  for (const float f : factors)
    if (!(f >= 1e-3f && f <= 1e6f))
      refuse(fmt::format("tensor rope_freqs.weight holds {}, 0.001 to 1e6 are allowed", f));
  facts_.rope.apply_factors(factors);
}

void GgufWeights::read_yarn(double factor) {
  if (!(facts_.rope.theta > 1))
    refuse(fmt::format("{} is {}, more than 1 is needed for yarn", key("rope.freq_base"), facts_.rope.theta));
  RopeFacts::Yarn yarn;
  yarn.factor = factor;
  yarn.original_context = static_cast<double>(
      file_.integer_or(key("rope.scaling.original_context_length"), 1, kMaxContext, facts_.context_length));
  yarn.beta_fast = file_.number_or(key("rope.scaling.yarn_beta_fast"), yarn.beta_fast);
  yarn.beta_slow = file_.number_or(key("rope.scaling.yarn_beta_slow"), yarn.beta_slow);
  if (!(yarn.beta_slow > 0 && yarn.beta_fast > yarn.beta_slow && yarn.beta_fast <= 1e6))
    refuse(fmt::format("yarn_beta_fast is {} and yarn_beta_slow {}; 1e6 >= fast > slow > 0 is needed", yarn.beta_fast,
                       yarn.beta_slow));
  facts_.rope.apply_yarn(yarn);
  // Engines disagree on what these do in these architectures; values that say the same as the factor pass.
  for (const auto& [rest, usual] : {std::pair{"yarn_log_multiplier", 0.0},
                                    {"yarn_ext_factor", 1.0},
                                    {"yarn_attn_factor", facts_.rope.attention_factor}}) {
    const std::string name = key(fmt::format("rope.scaling.{}", rest));
    if (const double found = file_.number_or(name, usual); !(std::abs(found - usual) <= 1e-6 * usual))
      refuse(fmt::format("{} is {}, only {} is supported", name, found, usual));
  }
}

void GgufWeights::check_tensors() const {
  std::set<std::string> used{"rope_freqs.weight"};
  for (const Weight weight : weights_of(facts_)) {
    for (int layer = 0; layer < (belongs_to_layer(weight) ? facts_.layers : 1); ++layer) {
      const std::string name = tensor_name(weight, layer);
      const GgufTensor* tensor = file_.find_tensor(name);
      if (!tensor) refuse(fmt::format("the tensor {} is missing", name));
      check_shape(file_.path(), name, tensor->shape, facts_, weight);
      used.insert(name);
    }
  }
  for (const GgufTensor& tensor : file_.tensors())
    if (!used.contains(tensor.name))
      refuse_model(fmt::format("the tensor {} is not part of a supported {} model (unsupported bias, norm or expert?)",
                               label(tensor.name), facts_.architecture));
}

}  // namespace

std::unique_ptr<ModelWeights> open_gguf(const std::string& path) { return std::make_unique<GgufWeights>(path); }

}  // namespace vqkv::model_files
