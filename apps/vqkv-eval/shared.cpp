#include <fmt/format.h>

#include <array>
#include <filesystem>
#include <numeric>

#include "codec/codec_archive.h"
#include "common/tool.h"
#include "config/config.h"
#include "experiment/runner.h"
#include "model/text_input.h"
#include "verbs.h"

namespace vqkv::eval {
namespace {

bool ends_with(const std::string& s, const std::string& end) { return s.size() >= end.size() && s.compare(s.size() - end.size(), end.size(), end) == 0; }

void require_same_shape(const CacheShape& have, const ModelFacts& model, const std::string& what) {
  const CacheShape want = model.cache_shape();
  if (have.layers != want.layers || have.q_heads != want.q_heads || have.kv_heads != want.kv_heads || have.head_dim != want.head_dim)
    fail_data(fmt::format("{}: made for {} layers, {}/{} heads of {}; {} has {} layers, {}/{} heads of {}", what, have.layers, have.q_heads, have.kv_heads,
                          have.head_dim, model.name, want.layers, want.q_heads, want.kv_heads, want.head_dim));
}

LoadedCodec load_archive(const std::string& path, const CommonOptions& common, const ModelFacts& model) {
  LoadedCodec out;
  std::string name = std::filesystem::path(path).filename().string();
  out.label = name.substr(0, name.find(".codec.h5"));
  out.codecs = std::make_shared<const CodecSet>(load_codec_set(path));
  require_same_shape(out.codecs->shape(), model, path);
  if (!out.codecs->model_hash().empty() && out.codecs->model_hash() != model.hash)
    fail_data(fmt::format("{}: trained on a model with hash {}, but {} has {}", path, out.codecs->model_hash(), model.name, model.hash));
  Config config;
  config.tree = Json::object();
  if (out.codecs->config().contains("cache")) config.tree["cache"] = out.codecs->config()["cache"];
  for (const auto& o : common.overrides) {
    if (o.rfind("cache.", 0) != 0)
      fail_usage(fmt::format("'{}': a frozen codec takes only cache.* overrides; its codec: section is trained", o));
    apply_override(config, o);
  }
  out.policy = CachePolicy::from_json(config.tree.value("cache", Json::object()));
  return out;
}

LoadedCodec train_cell_file(const std::string& path, const CommonOptions& common, const ModelFacts& model) {
  Config config = load_config(path);
  for (const auto& o : common.overrides) apply_override(config, o);
  const TrainedCell cell = train_cell(config);
  LoadedCodec out;
  out.label = std::filesystem::path(path).stem().string();
  out.codecs = cell.codecs;
  out.policy = cell.policy;
  require_same_shape(out.codecs->shape(), model, path);
  if (out.codecs->model_hash() != model.hash) fail_data(fmt::format("{}: its trace is of another model ({})", path, out.codecs->model_hash()));
  return out;
}

}  // namespace

std::unique_ptr<ModelRuntime> open_model(const CommonOptions& common) {
  return load_model(common.model, {.weights = dtype_from_name(common.weights)});
}

LoadedCodec load_codec(const std::string& spec, const CommonOptions& common, const ModelFacts& model) {
  if (spec == "exact") return {"exact", exact_codec_set(model.cache_shape()), CachePolicy::exact()};
  if (ends_with(spec, ".h5")) return load_archive(spec, common, model);
  if (ends_with(spec, ".yaml") || ends_with(spec, ".yml")) return train_cell_file(spec, common, model);
  fail_usage(fmt::format("--codec '{}' is neither exact nor a FILE.codec.h5 nor a cell.yaml", spec));
}

std::vector<LoadedCodec> load_codecs(const CommonOptions& common, const ModelFacts& model) {
  std::vector<LoadedCodec> out;
  for (const auto& spec : common.codecs) out.push_back(load_codec(spec, common, model));
  return out;
}

std::vector<ReplayText> read_texts(const TextOptions& text, const Tokenizer& tokenizer) {
  std::vector<ReplayText> out;
  for (auto& d : read_documents(text.texts, text.token_ids, tokenizer, text.max_tokens)) out.push_back({std::move(d.name), std::move(d.tokens)});
  return out;
}

CachePolicy without_window(const LoadedCodec& codec) {
  CachePolicy policy = codec.policy;
  std::array<int64_t, 2> block{1, 1};
  for (const auto& u : codec.codecs->units()) {
    int64_t& b = block[static_cast<size_t>(u.spec.unit.role)];
    b = std::lcm(b, static_cast<int64_t>(u.codec->layout().block_tokens));
  }
  policy.k = {1, block[0]};
  policy.v = {1, block[1]};
  return policy;
}

double bits_per_value(const ByteLedger& ledger, const CacheShape& shape, int64_t tokens, int64_t sequences) {
  const double values = 2.0 * shape.layers * shape.kv_heads * shape.head_dim * static_cast<double>(tokens);
  double bytes = static_cast<double>(ledger.total_sequence());
  if (sequences > 0) bytes += static_cast<double>(ledger.codebooks) / static_cast<double>(sequences);
  return 8 * bytes / values;
}

int run_ls(const std::string& what, TableFormat format) {
  Table table;
  if (what == "backends") {
    table.columns = {{"name", "name", "", false}};
    for (const auto& name : attention_backend_names()) table.rows.push_back({{"name", name}});
  } else {
    table.columns = {{"mode", "mode", "", false}, {"meaning", "meaning", "", false}};
    table.rows = {{{"mode", "forced"}, {"meaning", "what decoding token by token does, computed in blocks"}},
                  {{"mode", "stepwise"}, {"meaning", "token by token; equals forced up to rounding"}},
                  {{"mode", "prefill-exact"}, {"meaning", "exact attention over the prompt, coded once, then as forced"}},
                  {{"mode", "fake-quant"}, {"meaning", "every K and V decoded, the token's own included, no window; some papers' perplexity"}}};
  }
  print(table, format);
  return kExitOk;
}

}  // namespace vqkv::eval
