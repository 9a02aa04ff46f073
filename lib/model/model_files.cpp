#include "model/model_files.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <filesystem>

#include "core/error.h"
#include "core/finite.h"
#include "core/hash.h"
#include "core/json.h"
#include "core/thread_pool.h"
#include "io/ggml_dequant.h"
#include "model/model_files_common.h"

namespace vqkv {
namespace model_files {

namespace {

void require_finite(const std::string& where, int64_t row, const float* values, int64_t n) {
  if (all_finite(values, n)) return;
  const float* at = std::find_if(values, values + n, [](float v) { return !std::isfinite(v); });
  fail_data(fmt::format("{}: row {}, column {} is {}; weights must be finite", where, row, at - values, *at));
}

}  // namespace

bool belongs_to_layer(Weight weight) {
  return weight != Weight::kEmbedding && weight != Weight::kHead && weight != Weight::kFinalNorm;
}

std::vector<Weight> weights_of(const ModelFacts& facts) {
  std::vector<Weight> out{Weight::kEmbedding, Weight::kFinalNorm};
  if (!facts.tied_head) out.push_back(Weight::kHead);
  for (const Weight w : {Weight::kAttentionNorm, Weight::kQ, Weight::kK, Weight::kV, Weight::kO, Weight::kFfnNorm,
                         Weight::kGate, Weight::kUp, Weight::kDown})
    out.push_back(w);
  if (facts.qkv_bias) out.insert(out.end(), {Weight::kQBias, Weight::kKBias, Weight::kVBias});
  if (facts.o_bias) out.push_back(Weight::kOBias);
  if (facts.qk_norm) out.insert(out.end(), {Weight::kQNorm, Weight::kKNorm});
  return out;
}

std::pair<int64_t, int64_t> shape_of(const ModelFacts& f, Weight weight) {
  const int64_t q = int64_t{f.q_heads} * f.head_dim, kv = int64_t{f.kv_heads} * f.head_dim;
  switch (weight) {
    case Weight::kEmbedding:
    case Weight::kHead:
      return {f.vocab, f.hidden};
    case Weight::kFinalNorm:
    case Weight::kAttentionNorm:
    case Weight::kFfnNorm:
    case Weight::kOBias:
      return {1, f.hidden};
    case Weight::kQ:
      return {q, f.hidden};
    case Weight::kK:
    case Weight::kV:
      return {kv, f.hidden};
    case Weight::kO:
      return {f.hidden, q};
    case Weight::kQBias:
      return {1, q};
    case Weight::kKBias:
    case Weight::kVBias:
      return {1, kv};
    case Weight::kQNorm:
    case Weight::kKNorm:
      return {1, f.head_dim};
    case Weight::kGate:
    case Weight::kUp:
      return {f.ffn, f.hidden};
    case Weight::kDown:
      return {f.hidden, f.ffn};
  }
  fail_internal("shape_of: an unknown weight");
}

void check_shape(const std::string& path, const std::string& tensor, std::span<const int64_t> found,
                 const ModelFacts& facts, Weight weight) {
  const auto [rows, cols] = shape_of(facts, weight);
  const bool vector = rows == 1 && found.size() == 1 && found[0] == cols;
  const bool matrix = rows > 1 && found.size() == 2 && found[0] == rows && found[1] == cols;
  if (vector || matrix) return;
  fail_data(fmt::format("{}: tensor {} has shape ({}), {} expected", path, tensor, fmt::join(found, ", "),
                        rows == 1 ? fmt::format("({})", cols) : fmt::format("({}, {})", rows, cols)));
}

void check_facts(const std::string& where, const ModelFacts& f) {
  const auto in_range = [&](std::string_view name, int64_t value, int64_t highest) {
    if (value < 1 || value > highest)
      fail_data(fmt::format("{}: {} is {}, 1 to {} are allowed", where, name, value, highest));
  };
  in_range("the number of layers", f.layers, kMaxLayers);
  in_range("the hidden size", f.hidden, kMaxHidden);
  in_range("the number of query heads", f.q_heads, kMaxHeads);
  in_range("the number of KV heads", f.kv_heads, kMaxHeads);
  in_range("head_dim", f.head_dim, kMaxHeadDim);
  in_range("the feed-forward size", f.ffn, kMaxFfn);
  in_range("the vocabulary", f.vocab, kMaxVocab);
  in_range("the context length", f.context_length, kMaxContext);
  if (f.head_dim % 2 != 0)
    fail_data(fmt::format("{}: head_dim is {}, an even number is needed for RoPE", where, f.head_dim));
  if (f.q_heads % f.kv_heads != 0)
    fail_data(fmt::format("{}: {} query heads can't be shared among {} KV heads; a multiple is needed", where,
                          f.q_heads, f.kv_heads));
  if (!(f.norm_eps > 0 && f.norm_eps <= 0.1))
    fail_data(fmt::format("{}: the RMS norm's epsilon is {}, above 0 and up to 0.1 is allowed", where, f.norm_eps));
}

int64_t count_parameters(const ModelFacts& facts) {
  int64_t total = 0;
  for (const Weight w : weights_of(facts)) {
    const auto [rows, cols] = shape_of(facts, w);
    total += rows * cols * (belongs_to_layer(w) ? facts.layers : 1);
  }
  return total;
}

std::string label(std::string_view text) {
  std::string clean(text.substr(0, 200));
  for (char& c : clean)
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = '?';
  return Json::parse(Json(clean).dump(-1, ' ', false, Json::error_handler_t::replace)).get<std::string>();
}

std::string content_identity(std::span<const HashPart> parts) {
  constexpr size_t kChunk = size_t{64} << 20;  // part of the definition: another size gives another identity
  std::string text = "vqkv model content 1\n";
  for (const HashPart& part : parts) {
    const size_t chunks = (part.bytes.size() + kChunk - 1) / kChunk;
    std::vector<std::string> hashes(chunks);
    parallel_for(static_cast<int64_t>(chunks), [&](int64_t i) {
      const size_t first = static_cast<size_t>(i) * kChunk;
      ContentHash hash;
      hash.update(part.bytes.data() + first, std::min(kChunk, part.bytes.size() - first));
      hashes[static_cast<size_t>(i)] = hash.hex();
    });
    text += fmt::format("{} {}\n", part.name, part.bytes.size());
    for (const std::string& hash : hashes) text += hash + "\n";
  }
  return sha256_hex(text);
}

}  // namespace model_files

std::unique_ptr<ModelWeights> ModelWeights::open(const std::string& path) {
  std::error_code error;
  const auto status = std::filesystem::status(path, error);
  if (!std::filesystem::exists(status)) fail_data(fmt::format("{}: no such model file or folder", path));
  return std::filesystem::is_directory(status) ? model_files::open_hf(path) : model_files::open_gguf(path);
}

bool ModelWeights::has(Weight weight) const {
  switch (weight) {
    case Weight::kQBias:
    case Weight::kKBias:
    case Weight::kVBias:
      return facts_.qkv_bias;
    case Weight::kOBias:
      return facts_.o_bias;
    case Weight::kQNorm:
    case Weight::kKNorm:
      return facts_.qk_norm;
    default:
      return true;
  }
}

int64_t ModelWeights::rows(Weight weight) const { return model_files::shape_of(facts_, weight).first; }
int64_t ModelWeights::cols(Weight weight) const { return model_files::shape_of(facts_, weight).second; }

void ModelWeights::read_rows(Weight weight, int layer, int64_t first, int64_t count, MutMatrix out) const {
  const auto [all_rows, all_cols] = model_files::shape_of(facts_, weight);
  VQKV_CHECK(has(weight) && layer >= 0 && layer < facts_.layers);
  VQKV_CHECK(first >= 0 && count >= 0 && first + count <= all_rows && out.rows == count && out.cols == all_cols);
  if (weight == Weight::kHead && facts_.tied_head) weight = Weight::kEmbedding;
  const Stored tensor = stored(weight, layer);
  const auto type = static_cast<GgmlType>(tensor.type);
  const GgmlTypeFacts& facts = ggml_type_facts(type);
  const int64_t half = facts_.head_dim / 2;

  // Half-split row h*D + s*(D/2) + i is stored as row h*D + 2i + s.
  const auto stored_row = [&](int64_t row) {
    if (!tensor.interleaved) return row;
    const int64_t in_head = row % facts_.head_dim;
    return row - in_head + 2 * (in_head % half) + in_head / half;
  };
  if (all_rows == 1) {  // a vector; a bias counts as rows of one value
    if (!tensor.interleaved) {
      if (count == 0) return;
      ggml_dequantize(type, tensor.data, out.row(0), all_cols);
      model_files::require_finite(tensor.where, 0, out.row(0), all_cols);
      return;
    }
    if (count == 0) return;
    std::vector<float> values(static_cast<size_t>(all_cols));
    ggml_dequantize(type, tensor.data, values.data(), all_cols);
    model_files::require_finite(tensor.where, 0, values.data(), all_cols);
    for (int64_t i = 0; i < all_cols; ++i) out(0, i) = values[static_cast<size_t>(stored_row(i))];
    return;
  }
  const int64_t row_bytes = all_cols / facts.block_elements * facts.block_bytes;
  for (int64_t r = 0; r < count; ++r) {
    ggml_dequantize(type, tensor.data + stored_row(first + r) * row_bytes, out.row(r), all_cols);
    model_files::require_finite(tensor.where, stored_row(first + r), out.row(r), all_cols);
  }
}

void ModelWeights::read(Weight weight, int layer, MutMatrix out) const {
  const auto [all_rows, all_cols] = model_files::shape_of(facts_, weight);
  VQKV_CHECK(out.rows == all_rows && out.cols == all_cols);
  const int64_t chunk = std::max<int64_t>(1, (int64_t{1} << 16) / all_cols);  // about 256 KB of fp32 a task
  parallel_for((all_rows + chunk - 1) / chunk, [&, rows = all_rows](int64_t i) {
    const int64_t first = i * chunk, count = std::min(chunk, rows - first);
    read_rows(weight, layer, first, count, out.slice_rows(first, count));
  });
}

Matrix<float> ModelWeights::read(Weight weight, int layer) const {
  Matrix<float> out(rows(weight), cols(weight));
  read(weight, layer, out.view());
  return out;
}

}  // namespace vqkv
