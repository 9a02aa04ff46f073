#include "model/llama_cpu.h"

#include <fmt/format.h>

#include <algorithm>

#include "core/error.h"
#include "model/kernels_cpu.h"
#include "model/rows.h"

namespace vqkv {
namespace {

std::vector<float> read_vector(const ModelWeights& weights, Weight w, int layer) {
  const Matrix<float> m = weights.read(w, layer);
  return {m.storage.begin(), m.storage.end()};
}

PackedWeights read_packed(const ModelWeights& weights, std::initializer_list<Weight> parts, int layer, DType storage) {
  std::vector<Matrix<float>> plain;
  std::vector<ConstMatrix> views;
  for (const Weight w : parts) plain.push_back(weights.read(w, layer));
  for (const Matrix<float>& m : plain) views.push_back(m.view());
  return PackedWeights(views, storage);
}

MutMatrix shaped(AlignedVector<float>& buffer, int64_t rows, int64_t cols) {
  if (buffer.size() < static_cast<size_t>(rows * cols)) buffer.resize(static_cast<size_t>(rows * cols));
  return {buffer.data(), rows, cols};
}

}  // namespace

LlamaCpu::LlamaCpu(const ModelWeights& weights, DType storage, std::string tokenizer_path)
    : facts_(weights.facts()), storage_(storage), tokenizer_path_(std::move(tokenizer_path)) {
  plain_out_.resize(static_cast<size_t>(facts_.layers));
  for (int l = 0; l < facts_.layers; ++l) {
    Layer& layer = layers_.emplace_back();
    layer.attention_norm = read_vector(weights, Weight::kAttentionNorm, l);
    layer.ffn_norm = read_vector(weights, Weight::kFfnNorm, l);
    if (facts_.qkv_bias)
      for (const Weight w : {Weight::kQBias, Weight::kKBias, Weight::kVBias}) {
        const std::vector<float> part = read_vector(weights, w, l);
        layer.qkv_bias.insert(layer.qkv_bias.end(), part.begin(), part.end());
      }
    if (facts_.o_bias) layer.o_bias = read_vector(weights, Weight::kOBias, l);
    if (facts_.qk_norm) {
      layer.q_norm = read_vector(weights, Weight::kQNorm, l);
      layer.k_norm = read_vector(weights, Weight::kKNorm, l);
    }
    layer.qkv = read_packed(weights, {Weight::kQ, Weight::kK, Weight::kV}, l, storage);
    layer.out = read_packed(weights, {Weight::kO}, l, storage);
    layer.gate_up = read_packed(weights, {Weight::kGate, Weight::kUp}, l, storage);
    layer.down = read_packed(weights, {Weight::kDown}, l, storage);
  }
  final_norm_ = read_vector(weights, Weight::kFinalNorm, 0);
  embedding_ = read_packed(weights, {Weight::kEmbedding}, 0, storage);
  head_ = facts_.tied_head ? embedding_ : read_packed(weights, {Weight::kHead}, 0, storage);
}

LlamaCpu::LlamaCpu(const LlamaCpu& whole, DraftWeights weights, int group)
    : facts_(whole.facts_),
      storage_(whole.storage_),
      rounded_(weights == DraftWeights::kMlp ? "MLPs" : "layers"),
      layers_(whole.layers_),
      embedding_(whole.embedding_),
      head_(whole.head_),
      final_norm_(whole.final_norm_),
      tokenizer_path_(whole.tokenizer_path_) {
  plain_out_.resize(layers_.size());
  for (Layer& layer : layers_) {
    layer.gate_up = layer.gate_up.quantized(group);
    layer.down = layer.down.quantized(group);
    if (weights == DraftWeights::kMlp) continue;
    layer.qkv = layer.qkv.quantized(group);
    layer.out = layer.out.quantized(group);
  }
}

LlamaCpu::~LlamaCpu() = default;

std::unique_ptr<ModelRuntime> LlamaCpu::draft(DraftWeights weights, int group) const {
  return std::make_unique<LlamaCpu>(*this, weights, group);
}

std::string LlamaCpu::weights() const {
  const std::string rest = storage_ == DType::kF32 ? "f32" : embedding_.rounds_inputs() ? "bf16 x bf16" : "bf16 x f32";
  return rounded_.empty() ? rest : fmt::format("{}, {} int4 x f32", rest, rounded_);
}

int64_t LlamaCpu::weight_bytes() const {
  const auto of = [](const std::vector<float>& v) { return static_cast<int64_t>(v.size() * sizeof(float)); };
  int64_t bytes = head_.bytes() + of(final_norm_);
  for (const Layer& l : layers_)
    bytes += l.qkv.bytes() + l.out.bytes() + l.gate_up.bytes() + l.down.bytes() + of(l.attention_norm) +
             of(l.ffn_norm) + of(l.qkv_bias) + of(l.o_bias) + of(l.q_norm) + of(l.k_norm);
  return bytes;
}

const Tokenizer& LlamaCpu::tokenizer() const {
  const std::lock_guard lock(lazy_);
  if (!tokenizer_) tokenizer_ = load_tokenizer(tokenizer_path_);
  return *tokenizer_;
}

ConstMatrix LlamaCpu::output_weight(int layer) const {
  VQKV_CHECK(layer >= 0 && layer < facts_.layers);
  const std::lock_guard lock(lazy_);
  Matrix<float>& plain = plain_out_[static_cast<size_t>(layer)];
  if (plain.rows == 0) {
    const PackedWeights& packed = layers_[static_cast<size_t>(layer)].out;
    plain = Matrix<float>(packed.out_features(), packed.in_features());
    for (int64_t r = 0; r < plain.rows; ++r) packed.copy_row(r, plain.row(r));
  }
  return plain.view();
}

// Bias and q/k norm after the product; what a tap and the cache see.
void LlamaCpu::attention_inputs(const Layer& layer, ConstMatrix x, MutMatrix qkv, MutMatrix unnormed) const {
  layer.qkv.apply(x, qkv);
  if (layer.qkv_bias.empty() && layer.q_norm.empty()) return;
  const int64_t d = facts_.head_dim;
  for_rows(qkv.rows, [&](int64_t r) {
    float* row = qkv.row(r);
    if (!layer.qkv_bias.empty()) add_bias(row, layer.qkv_bias.data(), qkv.cols);
    if (layer.q_norm.empty()) return;
    if (unnormed.rows > 0) std::copy_n(row, unnormed.cols, unnormed.row(r));
    for (int64_t h = 0; h < facts_.q_heads + facts_.kv_heads; ++h)
      rms_norm(row + h * d, (h < facts_.q_heads ? layer.q_norm : layer.k_norm).data(), facts_.norm_eps, row + h * d, d);
  });
}

// x += down(silu(gate(norm(x))) * up(norm(x)))
void LlamaCpu::mlp(const Layer& layer, MutMatrix x) {
  const int64_t ffn = facts_.ffn;
  for (int64_t first = 0; first < x.rows; first += kMlpTile) {
    const int64_t rows = std::min(kMlpTile, x.rows - first);
    const MutMatrix part = x.slice_rows(first, rows);
    const MutMatrix normed = shaped(act_.normed, rows, x.cols);
    const MutMatrix wide = shaped(act_.wide, rows, 2 * ffn);
    norm_rows(part, layer.ffn_norm.data(), facts_.norm_eps, normed);
    layer.gate_up.apply(normed, wide);
    for_rows(rows, [&](int64_t r) { swiglu(wide.row(r), wide.row(r) + ffn, ffn); });
    layer.down.apply(wide.slice_cols(0, ffn), part, true);
  }
}

void LlamaCpu::require_runnable(const SequenceBlock& block) const {
  VQKV_CHECK(!block.tokens.empty());
  if (block.kv->device() != "cpu")
    fail_unavailable(fmt::format("this model runs on the cpu and the cache's session on {}; open both on one device",
                                 block.kv->device()));
  const CacheShape& shape = block.kv->cache().shape();
  VQKV_CHECK(shape.layers == facts_.layers && shape.q_heads == facts_.q_heads && shape.kv_heads == facts_.kv_heads &&
             shape.head_dim == facts_.head_dim);
  if (facts_.sliding_window > 0)
    facts_.require_context(block.kv->cache().length() + static_cast<int64_t>(block.tokens.size()));
  if (const int64_t limit = block.kv->cache().block_limit(); static_cast<int64_t>(block.tokens.size()) > limit)
    fail_usage(
        fmt::format("a block of {} tokens of a cache whose policy decides after {}: forward() cuts there, a batch "
                    "has to be cut",
                    block.tokens.size(), limit));
  require_tokens(block.tokens);
}

void LlamaCpu::require_tokens(std::span<const int32_t> tokens) const {
  for (const int32_t t : tokens)
    if (t < 0 || t >= facts_.vocab)
      fail_usage(fmt::format("token id {} is not in the vocabulary of {} (allowed: 0 to {})", t, facts_.name,
                             facts_.vocab - 1));
}

void LlamaCpu::run(std::span<const SequenceBlock> batch, int64_t n, LogitRows rows, MutMatrix logits) {
  const int64_t hidden = facts_.hidden, q_cols = int64_t{facts_.q_heads} * facts_.head_dim,
                kv_cols = int64_t{facts_.kv_heads} * facts_.head_dim;
  std::vector<int32_t> tokens;
  for (const SequenceBlock& b : batch) tokens.insert(tokens.end(), b.tokens.begin(), b.tokens.end());

  MutMatrix x = shaped(act_.stream, n, hidden);
  for_rows(n, [&](int64_t r) { embedding_.copy_row(tokens[static_cast<size_t>(r)], x.row(r)); });
  const MutMatrix qkv = shaped(act_.qkv, n, q_cols + 2 * kv_cols);
  MutMatrix attended = shaped(act_.attended, n, q_cols);
  for (int l = 0; l < facts_.layers; ++l) {
    const Layer& layer = layers_[static_cast<size_t>(l)];
    const MutMatrix normed = shaped(act_.normed, n, hidden);
    norm_rows(x, layer.attention_norm.data(), facts_.norm_eps, normed);
    attention_inputs(layer, normed, qkv);
    int64_t at = 0;
    for (const SequenceBlock& b : batch) {
      const int64_t m = static_cast<int64_t>(b.tokens.size());
      const ConstMatrix own = ConstMatrix(qkv).slice_rows(at, m);
      const ConstMatrix q = own.slice_cols(0, q_cols), k = own.slice_cols(q_cols, kv_cols),
                        v = own.slice_cols(q_cols + kv_cols, kv_cols);
      if (b.tap) b.tap->on_qkv(l, b.kv->cache().length(), q, k, v);
      b.kv->attend(l, q, k, v, attended.slice_rows(at, m));
      at += m;
    }
    if (l + 1 == facts_.layers && rows != LogitRows::kAll) {
      // After the last attention only the rows whose logits are wanted go on.
      if (rows == LogitRows::kNone) return;
      int64_t end = 0;
      for (int64_t i = 0; i < logits.rows; ++i) {
        end += static_cast<int64_t>(batch[static_cast<size_t>(i)].tokens.size());
        if (end == i + 1) continue;
        std::copy_n(x.row(end - 1), hidden, x.row(i));
        std::copy_n(attended.row(end - 1), q_cols, attended.row(i));
      }
      x = x.slice_rows(0, logits.rows);
      attended = attended.slice_rows(0, logits.rows);
    }
    layer.out.apply(attended, x, true);
    if (!layer.o_bias.empty()) for_rows(x.rows, [&](int64_t r) { add_bias(x.row(r), layer.o_bias.data(), hidden); });
    mlp(layer, x);
  }
  const MutMatrix normed = shaped(act_.normed, x.rows, hidden);
  norm_rows(x, final_norm_.data(), facts_.norm_eps, normed);
  head_.apply(normed, logits);
}

void LlamaCpu::forward_batch(std::span<const SequenceBlock> batch, LogitRows rows, MutMatrix logits) {
  int64_t n = 0;
  for (const SequenceBlock& b : batch) {
    require_runnable(b);
    n += static_cast<int64_t>(b.tokens.size());
  }
  if (n == 0) return;
  const int64_t wanted = rows == LogitRows::kAll ? n : static_cast<int64_t>(batch.size());
  VQKV_CHECK(rows == LogitRows::kNone || (logits.rows == wanted && logits.cols == facts_.vocab));
  for (size_t a = 0; a < batch.size(); ++a)
    for (size_t b = a + 1; b < batch.size(); ++b) VQKV_CHECK(batch[a].kv != batch[b].kv);
  const std::lock_guard lock(running_);
  for (const SequenceBlock& b : batch) b.kv->begin_block(static_cast<int64_t>(b.tokens.size()), b.visibility);
  run(batch, n, rows, logits);
  for (const SequenceBlock& b : batch) b.kv->end_block();
}

void ModelRuntime::forward(std::span<const int32_t> tokens, KvSession& kv, LogitRows rows, MutMatrix logits,
                           Visibility visibility, ModelTap* tap) {
  if (tokens.empty()) return;
  const bool all = rows == LogitRows::kAll;
  const auto n = static_cast<int64_t>(tokens.size());
  // Where the cache decides what it keeps the block is cut: what comes after sees what is left.
  for (int64_t at = 0, m = 0; at < n; at += m) {
    m = std::min(n - at, kv.cache().block_limit());
    const bool wanted = all || at + m == n;
    const SequenceBlock block{tokens.subspan(static_cast<size_t>(at), static_cast<size_t>(m)), &kv, visibility, tap};
    forward_batch(std::span(&block, 1), wanted ? rows : LogitRows::kNone,
                  all      ? logits.slice_rows(at, m)
                  : wanted ? logits
                           : MutMatrix());
  }
}

const Tokenizer* ModelRuntime::find_tokenizer() const {
  try {
    return &tokenizer();
  } catch (const Error& e) {
    if (e.kind() != ErrorKind::kBadData) throw;
    return nullptr;
  }
}

double ModelRuntime::backward(std::span<const int32_t>, LogitLoss&, GradientTap&) {
  fail_unavailable("this runtime has no backward pass; the one on the cpu has");
}

std::unique_ptr<ModelRuntime> ModelRuntime::draft(DraftWeights, int) const {
  fail_unavailable("this runtime makes no draft of its model; the one on the cpu does");
}

std::unique_ptr<ModelRuntime> load_model(const std::string& path, const RuntimeOptions& options) {
  if (options.weights != DType::kF32 && options.weights != DType::kBF16)
    fail_usage(fmt::format("weights can't be held as {}; allowed: f32, bf16", dtype_name(options.weights)));
  return std::make_unique<LlamaCpu>(*ModelWeights::open(path), options.weights, path);
}

}  // namespace vqkv
