// The backward pass of the Llama family: forward with each layer's input kept, then from the last layer to the first
// every layer forward once more and backward.
#include <algorithm>
#include <numeric>

#include "core/error.h"
#include "model/causal_attention.h"
#include "model/llama_cpu.h"
#include "model/rows.h"

namespace vqkv {
namespace {

constexpr int64_t kLogitRows = 256;  // positions whose logits are there at once: (256, vocab)

void copy(ConstMatrix from, MutMatrix to) {
  for_rows(from.rows, [&](int64_t r) { std::copy_n(from.row(r), from.cols, to.row(r)); });
}

}  // namespace

struct LlamaCpu::Backward {
  Backward(LlamaCpu& model, std::span<const int32_t> window)
      : m(model),
        f(model.facts_),
        n(static_cast<int64_t>(window.size())),
        d(f.head_dim),
        q_cols(f.q_heads * d),
        kv_cols(f.kv_heads * d),
        tokens(window),
        positions(window.size()),
        scale(f.cache_shape().score_scale),
        rope(f.rope),
        qkv(n, q_cols + 2 * kv_cols),
        dqkv(n, q_cols + 2 * kv_cols),
        unnormed(f.qk_norm ? n : 0, q_cols + kv_cols),
        attended(n, q_cols),
        dattended(n, q_cols),
        by_head(n, 2 * q_cols),
        normed(n, f.hidden),
        middle(n, f.hidden),
        dx(n, f.hidden),
        wide(std::min(n, kMlpTile), 2 * f.ffn),
        product(std::min(n, kMlpTile), f.ffn),
        log_sum(f.q_heads, n) {
    std::iota(positions.begin(), positions.end(), 0);
  }

  double run(LogitLoss& loss, GradientTap& tap);

 private:
  MutMatrix q(Matrix<float>& all, int64_t head) const { return all.view().slice_cols(head * d, d); }
  MutMatrix k(Matrix<float>& all, int64_t head) const { return all.view().slice_cols(q_cols + head * d, d); }
  MutMatrix v(Matrix<float>& all, int64_t head) const { return all.view().slice_cols(q_cols + kv_cols + head * d, d); }
  AttentionHead head(int64_t q_head) {
    const int64_t kv_head = q_head / (f.q_heads / f.kv_heads);
    return {q(qkv, q_head), k(qkv, kv_head), v(qkv, kv_head), scale};
  }

  void attention_forward(const Layer& layer, ConstMatrix x);
  double head_backward(LogitLoss& loss, ConstMatrix x);
  void mlp_backward(const Layer& layer);
  void attention_backward(const Layer& layer);
  void inputs_backward(const Layer& layer, ConstMatrix x);

  LlamaCpu& m;
  const ModelFacts& f;
  int64_t n, d, q_cols, kv_cols;
  std::span<const int32_t> tokens;
  std::vector<int32_t> positions;
  float scale;
  RopeTable rope;
  Matrix<float> qkv, dqkv;            // (n, q+2kv); q and k after RoPE
  Matrix<float> unnormed;             // (n, q+k) before q/k norm, where the model has it
  Matrix<float> attended, dattended;  // (n, q)
  Matrix<float> by_head;              // (n, 2q): gradients of k and of v, of each query head alone
  Matrix<float> normed;               // (n, hidden), and gradients with respect to it
  Matrix<float> middle;               // (n, hidden): the residual stream between attention and MLP
  Matrix<float> dx;                   // (n, hidden): the gradient with respect to the residual stream
  Matrix<float> wide;                 // (tile, 2*ffn): gate and up, then the gradients with respect to them
  Matrix<float> product;              // (tile, ffn): the gradient with respect to silu(gate) * up
  Matrix<float> log_sum;              // (q_heads, n)
};

// `middle` and all that the way back needs, from a layer's input.
void LlamaCpu::Backward::attention_forward(const Layer& layer, ConstMatrix x) {
  norm_rows(x, layer.attention_norm.data(), f.norm_eps, normed);
  m.attention_inputs(layer, normed, qkv, unnormed);
  const MutMatrix qk = qkv.view().slice_cols(0, q_cols + kv_cols);
  for_rows(n, [&](int64_t r) { rope_apply(rope, &positions[static_cast<size_t>(r)], qk.slice_rows(r, 1)); });
  parallel_for(f.q_heads, [&](int64_t h) { attend_causal(head(h), q(attended, h), log_sum.row(h)); });
  copy(x, middle);
  layer.out.apply(attended, middle, true);
  if (!layer.o_bias.empty()) for_rows(n, [&](int64_t r) { add_bias(middle.row(r), layer.o_bias.data(), f.hidden); });
}

// The loss, and dx with respect to the last layer's output.
double LlamaCpu::Backward::head_backward(LogitLoss& loss, ConstMatrix x) {
  double sum = 0;
  Matrix<float> logits(std::min(n, kLogitRows), f.vocab);
  for (int64_t first = 0; first < n; first += kLogitRows) {
    const int64_t rows = std::min(kLogitRows, n - first);
    const MutMatrix part = logits.view().slice_rows(0, rows), in = normed.view().slice_rows(first, rows);
    norm_rows(x.slice_rows(first, rows), m.final_norm_.data(), f.norm_eps, in);
    m.head_.apply(in, part);
    sum += loss.differentiate(first, part);
    m.head_.apply_transposed(part, in);
  }
  for_rows(n, [&](int64_t r) {
    rms_norm_backward(x.row(r), m.final_norm_.data(), f.norm_eps, normed.row(r), dx.row(r), f.hidden, false);
  });
  return sum;
}

// dx: from the layer's output to `middle`.
void LlamaCpu::Backward::mlp_backward(const Layer& layer) {
  const int64_t ffn = f.ffn;
  for (int64_t first = 0; first < n; first += kMlpTile) {
    const int64_t rows = std::min(kMlpTile, n - first);
    const MutMatrix x = middle.view().slice_rows(first, rows), grad = dx.view().slice_rows(first, rows),
                    in = normed.view().slice_rows(first, rows), both = wide.view().slice_rows(0, rows),
                    out = product.view().slice_rows(0, rows);
    norm_rows(x, layer.ffn_norm.data(), f.norm_eps, in);
    layer.gate_up.apply(in, both);
    layer.down.apply_transposed(grad, out);
    for_rows(rows, [&](int64_t r) { swiglu_backward(both.row(r), both.row(r) + ffn, out.row(r), ffn); });
    layer.gate_up.apply_transposed(both, in);
    for_rows(rows, [&](int64_t r) {
      rms_norm_backward(x.row(r), layer.ffn_norm.data(), f.norm_eps, in.row(r), grad.row(r), f.hidden, true);
    });
  }
}

// dqkv with respect to q and k after RoPE and to v, from dx with respect to `middle`.
void LlamaCpu::Backward::attention_backward(const Layer& layer) {
  layer.out.apply_transposed(dx, dattended);
  for_rows(n, [&](int64_t r) { std::fill_n(by_head.row(r), by_head.cols, 0.0f); });
  const int64_t group = f.q_heads / f.kv_heads;
  // A query head adds to keys and values of its own; those of a group come together in order.
  parallel_for(f.q_heads, [&](int64_t h) {
    attend_causal_backward(head(h), q(attended, h), log_sum.row(h), q(dattended, h), q(dqkv, h),
                           by_head.view().slice_cols(h * d, d), by_head.view().slice_cols(q_cols + h * d, d));
  });
  for_rows(n, [&](int64_t r) {
    for (int64_t side = 0; side < 2; ++side)
      for (int64_t h = 0; h < f.kv_heads; ++h) {
        float* out = dqkv.row(r) + q_cols + side * kv_cols + h * d;
        const float* in = by_head.row(r) + side * q_cols + h * group * d;
        std::copy_n(in, d, out);
        for (int64_t g = 1; g < group; ++g)
          for (int64_t c = 0; c < d; ++c) out[c] += in[g * d + c];
      }
  });
}

// dx: through RoPE's, q/k norm's and the products' inputs, from `middle` to the layer's input.
void LlamaCpu::Backward::inputs_backward(const Layer& layer, ConstMatrix x) {
  if (!layer.q_norm.empty())
    for_rows(n, [&](int64_t r) {
      for (int64_t h = 0; h < f.q_heads + f.kv_heads; ++h) {
        const float* weight = (h < f.q_heads ? layer.q_norm : layer.k_norm).data();
        float* grad = dqkv.row(r) + h * d;
        rms_norm_backward(unnormed.row(r) + h * d, weight, f.norm_eps, grad, grad, d, false);
      }
    });
  layer.qkv.apply_transposed(dqkv, normed);
  for_rows(n, [&](int64_t r) {
    rms_norm_backward(x.row(r), layer.attention_norm.data(), f.norm_eps, normed.row(r), dx.row(r), f.hidden, true);
  });
}

double LlamaCpu::Backward::run(LogitLoss& loss, GradientTap& tap) {
  std::vector<Matrix<float>> inputs;  // of each layer
  Matrix<float> x(n, f.hidden);
  for_rows(n, [&](int64_t r) { m.embedding_.copy_row(tokens[static_cast<size_t>(r)], x.row(r)); });
  for (const Layer& layer : m.layers_) {
    attention_forward(layer, x);
    inputs.push_back(std::move(x));
    x = middle;
    m.mlp(layer, x);
  }
  const double sum = head_backward(loss, x);
  Matrix<float> rotated(n, kv_cols);
  const MutMatrix dqk = dqkv.view().slice_cols(0, q_cols + kv_cols), dk = dqkv.view().slice_cols(q_cols, kv_cols),
                  dv = dqkv.view().slice_cols(q_cols + kv_cols, kv_cols);
  for (int l = f.layers - 1; l >= 0; --l) {
    const Layer& layer = m.layers_[static_cast<size_t>(l)];
    attention_forward(layer, inputs.back());
    mlp_backward(layer);
    attention_backward(layer);
    copy(dk, rotated);
    for_rows(n, [&](int64_t r) { rope_transpose(rope, &positions[static_cast<size_t>(r)], dqk.slice_rows(r, 1)); });
    tap.on_gradients(l, dk, rotated, dv);
    if (l > 0) inputs_backward(layer, inputs.back());
    inputs.pop_back();
  }
  return sum;
}

double LlamaCpu::backward(std::span<const int32_t> tokens, LogitLoss& loss, GradientTap& tap) {
  const auto n = static_cast<int64_t>(tokens.size());
  if (n == 0) fail_usage("a backward pass needs a window of at least one token");
  facts_.require_context(n);
  require_tokens(tokens);
  loss.require(n, facts_.vocab);
  const std::lock_guard lock(running_);
  return Backward(*this, tokens).run(loss, tap);
}

}  // namespace vqkv
