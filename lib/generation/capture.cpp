#include "generation/capture.h"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>

#include "attention/provided.h"
#include "attention/sequence.h"
#include "core/error.h"
#include "core/rng.h"
#include "core/rope.h"

namespace vqkv {
namespace {

// Gathers one window. A runtime may hand a layer over in one block or several.
class CaptureTap final : public ModelTap {
 public:
  CaptureTap(const CacheShape& shape, const CapturePlan::Window& window)
      : shape_(shape), rope_(shape.rope), window_(window) {
    const auto n = static_cast<int64_t>(window.tokens.size()), m = static_cast<int64_t>(window.query_token.size());
    const int64_t kv = int64_t{shape.kv_heads} * shape.head_dim, layers = shape.layers;
    data_.document = window.document;
    data_.token_id = window.tokens;
    data_.query_token = window.query_token;
    data_.position.resize(window.tokens.size());
    std::iota(data_.position.begin(), data_.position.end(), 0);
    for (int64_t l = 0; l < layers; ++l) {
      data_.key.emplace_back(n, kv);
      data_.value.emplace_back(n, kv);
      data_.query.emplace_back(m, int64_t{shape.q_heads} * shape.head_dim);
    }
    const size_t heads = static_cast<size_t>(shape.kv_heads), d = static_cast<size_t>(shape.head_dim);
    data_.query_moment.assign(static_cast<size_t>(layers), std::vector<double>(heads * d * d, 0.0));
    data_.query_pair_moment.assign(static_cast<size_t>(layers), std::vector<double>(heads * d / 2, 0.0));
    mass_.assign(static_cast<size_t>(layers), std::vector<double>(heads * static_cast<size_t>(n), 0.0));
    mass2_ = mass_;
    seen_.assign(static_cast<size_t>(layers), 0);
  }

  void on_qkv(int layer, int64_t first, ConstMatrix q, ConstMatrix k, ConstMatrix v) override {
    const size_t l = static_cast<size_t>(layer);
    const int64_t n = static_cast<int64_t>(window_.tokens.size()), d = shape_.head_dim, group = shape_.group();
    VQKV_CHECK(layer >= 0 && layer < shape_.layers && first == seen_[l] && first + q.rows <= n && k.rows == q.rows &&
               v.rows == q.rows);
    seen_[l] += q.rows;
    for (int64_t r = 0; r < q.rows; ++r) {
      std::copy_n(k.row(r), k.cols, data_.key[l].row(first + r));
      std::copy_n(v.row(r), v.cols, data_.value[l].row(first + r));
    }
    // Recorded queries of this block: rows [from, to) of the window's list.
    const auto& at = window_.query_token;
    const int64_t from = std::lower_bound(at.begin(), at.end(), first) - at.begin();
    const int64_t to = std::lower_bound(at.begin(), at.end(), first + q.rows) - at.begin();
    for (int64_t i = from; i < to; ++i)
      std::copy_n(q.row(at[static_cast<size_t>(i)] - first), q.cols, data_.query[l].row(i));

    const Matrix<float> rotated = rotate(q, first);
    for (int h = 0; h < shape_.kv_heads; ++h) {
      const size_t hs = static_cast<size_t>(h), ds = static_cast<size_t>(d);
      add_moment(rotated.view().slice_cols(h * group * d, group * d), shape_.group(),
                 data_.query_moment[l].data() + hs * ds * ds);
      add_query_pair_moment(q.slice_cols(h * group * d, group * d), shape_.group(), shape_.rope.rotary_dim,
                            data_.query_pair_moment[l].data() + hs * ds / 2);
    }
    if (from == to) return;
    const int64_t keys = first + q.rows;
    const Matrix<float> rotated_keys = rotate(data_.key[l].view().slice_rows(0, keys), 0);
    Matrix<float> recorded(to - from, q.cols);
    for (int64_t i = from; i < to; ++i)
      std::copy_n(rotated.row(at[static_cast<size_t>(i)] - first), q.cols, recorded.row(i - from));
    const std::span<const int32_t> position(at.data() + from, static_cast<size_t>(to - from));
    for (int h = 0; h < shape_.kv_heads; ++h)
      add_received_mass(recorded.view().slice_cols(h * group * d, group * d), shape_.group(), position,
                        rotated_keys.view().slice_cols(h * d, d), shape_.score_scale, mass_[l].data() + h * n,
                        mass2_[l].data() + h * n);
  }

  TraceWindowData finish() {
    for (const int64_t seen : seen_) VQKV_CHECK(seen == static_cast<int64_t>(window_.tokens.size()));
    for (size_t l = 0; l < mass_.size(); ++l) {
      data_.received_mass.emplace_back(mass_[l].begin(), mass_[l].end());
      data_.received_mass2.emplace_back(mass2_[l].begin(), mass2_[l].end());
    }
    return std::move(data_);
  }

 private:
  Matrix<float> rotate(ConstMatrix x, int64_t first) const {
    Matrix<float> out(x.rows, x.cols);
    for (int64_t r = 0; r < x.rows; ++r) std::copy_n(x.row(r), x.cols, out.row(r));
    std::vector<int32_t> positions(static_cast<size_t>(x.rows));
    std::iota(positions.begin(), positions.end(), static_cast<int32_t>(first));
    rope_apply(rope_, positions.data(), out);
    return out;
  }

  CacheShape shape_;
  RopeTable rope_;
  const CapturePlan::Window& window_;
  TraceWindowData data_;
  std::vector<std::vector<double>> mass_, mass2_;  // per layer (kv_heads, n)
  std::vector<int64_t> seen_;                      // tokens handed over, per layer
};

// Squares and sums of products of one window's gradients, into what the trace takes.
class GradientCapture final : public GradientTap {
 public:
  GradientCapture(const CacheShape& shape, TraceWindowData& data) : shape_(shape), data_(data) {
    for (const GradientOf of : kGradientsOf) {
      data_.squared_gradient[index(of)].resize(static_cast<size_t>(shape.layers));
      data_.gradient_moment[index(of)].assign(
          static_cast<size_t>(shape.layers),
          std::vector<double>(static_cast<size_t>(int64_t{shape.kv_heads} * shape.head_dim * shape.head_dim), 0.0));
    }
  }

  void on_gradients(int layer, ConstMatrix key, ConstMatrix rotated_key, ConstMatrix value) override {
    add(GradientOf::kKey, layer, key);
    add(GradientOf::kRotatedKey, layer, rotated_key);
    add(GradientOf::kValue, layer, value);
  }

 private:
  static size_t index(GradientOf of) { return static_cast<size_t>(of); }
  void add(GradientOf of, int layer, ConstMatrix g) {
    const auto l = static_cast<size_t>(layer);
    const int64_t d = shape_.head_dim;
    Matrix<float>& square = data_.squared_gradient[index(of)][l];
    square = Matrix<float>(g.rows, g.cols);
    for (int64_t r = 0; r < g.rows; ++r)
      for (int64_t c = 0; c < g.cols; ++c) square(r, c) = g(r, c) * g(r, c);
    for (int64_t h = 0; h < shape_.kv_heads; ++h)
      add_moment(g.slice_cols(h * d, d), 1, data_.gradient_moment[index(of)][l].data() + h * d * d);
  }

  CacheShape shape_;
  TraceWindowData& data_;
};

std::unique_ptr<LogitLoss> loss_of(const std::string& name, const CapturePlan::Window& window, uint64_t place) {
  if (name == "next-token") return std::make_unique<NllLoss>(NllLoss::next_tokens(window.tokens));
  if (name == "sampled")
    return std::make_unique<SampledNllLoss>(static_cast<int64_t>(window.tokens.size()),
                                            Rng::from_text("capture: labels").split(place).key());
  fail_usage(fmt::format("gradients of the loss '{}'; allowed: next-token, sampled", name));
}

}  // namespace

CapturePlan plan_capture(std::span<const TextDocument> documents, const CaptureOptions& o, const ModelFacts& facts,
                         const SpecialTokens& special) {
  CapturePlan plan;
  plan.bos = special.add_bos;
  if (o.context - (plan.bos ? 1 : 0) < 1) fail_usage(fmt::format("a context of {} holds no text", o.context));
  facts.require_context(o.context);
  if (o.query_stride < 1 || o.query_tail < 0 || o.max_tokens < 0)
    fail_usage(fmt::format("query stride {} (at least 1), query tail {} and max tokens {} (at least 0)", o.query_stride,
                           o.query_tail, o.max_tokens));
  if (documents.empty()) fail_usage("no document to capture");
  for (const TextDocument& d : documents) {
    auto n = static_cast<int64_t>(d.tokens.size());
    if (o.max_tokens > 0) n = std::min(n, o.max_tokens);
    if (n == 0) fail_data(fmt::format("{}: holds no token", d.name));
    for (size_t i = 0; i < d.tokens.size(); ++i)
      if (d.tokens[i] < 0 || d.tokens[i] >= facts.vocab)
        fail_data(
            fmt::format("{}: token {} is {}; the vocabulary has {} entries", d.name, i, d.tokens[i], facts.vocab));
    for (int64_t at = 0; at < n;) {
      CapturePlan::Window w;
      w.document = static_cast<int32_t>(plan.names.size());
      w.tokens = take_window(std::span(d.tokens).first(static_cast<size_t>(n)), at, o.context, special);
      const auto length = static_cast<int64_t>(w.tokens.size());
      for (int64_t t = 0; t < length; ++t)
        if (t % o.query_stride == 0 || t >= length - o.query_tail) w.query_token.push_back(static_cast<int32_t>(t));
      plan.tokens += length;
      plan.queries += static_cast<int64_t>(w.query_token.size());
      plan.windows.push_back(std::move(w));
    }
    plan.names.push_back(d.name);
  }
  return plan;
}

TraceInfo capture_info(const ModelFacts& facts, const CaptureOptions& options) {
  TraceInfo info;
  info.shape = facts.cache_shape();
  info.hidden = options.output_weight ? facts.hidden : 0;
  info.stored = options.dtype;
  info.keys_pre_rope = true;
  info.gradients = options.gradients;
  for (int l = 0; l < info.shape.layers; ++l) info.layer_index.push_back(l);
  info.model_name = facts.name;
  info.model_hash = facts.hash;
  info.model = facts.to_json();
  return info;
}

bool capture_trace(ModelRuntime& model, const CapturePlan& plan, TraceWriter& writer,
                   const std::function<bool(int64_t)>& progress, const std::string& attention) {
  const CacheShape shape = model.facts().cache_shape();
  // f32 rows: what a trace holds is the model's, not yet some cache's. A device has none.
  const DType rows = attention == kDeviceAttention ? DType::kBF16 : DType::kF32;
  Sequence sequence(shape, CachePolicy::exact(rows), attention);
  int64_t done = 0;
  uint64_t windows = 0;
  for (const CapturePlan::Window& w : plan.windows) {
    sequence.restart();
    CaptureTap tap(shape, w);
    model.forward(w.tokens, sequence.session(), LogitRows::kNone, {}, Visibility::kReplay, &tap);
    TraceWindowData data = tap.finish();
    if (!writer.records_gradients().empty()) {
      GradientCapture gradients(shape, data);
      model.backward(w.tokens, *loss_of(writer.records_gradients(), w, windows++), gradients);
    }
    writer.add(data);
    done += static_cast<int64_t>(w.tokens.size());
    if (progress && !progress(done)) return false;
  }
  if (writer.records_output_weight())
    for (int l = 0; l < shape.layers; ++l) writer.output_weight(l, model.output_weight(l));
  writer.finish();
  return true;
}

}  // namespace vqkv
