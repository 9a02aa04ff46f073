// A model of the Llama family with random weights, and its forward pass in double from the formulas: what the runtime's
// gradients are held to by finite differences.
#pragma once
#include <cmath>
#include <map>
#include <vector>

#include "core/rng.h"
#include "io/ggml_dequant.h"
#include "model/model_files.h"
#include "model/model_files_common.h"

namespace vqkv::testing {

class RandomWeights final : public ModelWeights {
 public:
  RandomWeights(ModelFacts facts, uint64_t seed) {
    facts_ = std::move(facts);
    for (const Weight w : model_files::weights_of(facts_))
      for (int l = 0; l < (model_files::belongs_to_layer(w) ? facts_.layers : 1); ++l)
        made_[{w, l}] = random(w, Rng(seed).split(static_cast<uint64_t>(w) * 100 + static_cast<uint64_t>(l)));
  }

 protected:
  Stored stored(Weight weight, int layer) const override {
    const std::vector<float>& v = made_.at({weight, model_files::belongs_to_layer(weight) ? layer : 0});
    return {reinterpret_cast<const uint8_t*>(v.data()), static_cast<uint32_t>(GgmlType::kF32), false, "random"};
  }

 private:
  std::vector<float> random(Weight w, Rng rng) const {
    const bool bias = w == Weight::kQBias || w == Weight::kKBias || w == Weight::kVBias || w == Weight::kOBias,
               norm = rows(w) == 1 && !bias;
    // Scores of a few units, so that softmax has slopes worth comparing.
    const double gain = bias || norm              ? 0.3
                        : w == Weight::kEmbedding ? 1
                                                  : 1.5 / std::sqrt(static_cast<double>(cols(w)));
    std::vector<float> out;
    for (int64_t i = 0; i < rows(w) * cols(w); ++i)
      out.push_back(static_cast<float>((norm ? 1 : 0) + gain * rng.normal()));
    return out;
  }
  std::map<std::pair<Weight, int>, std::vector<float>> made_;
};

enum class Part { kKey, kRotatedKey, kValue };

// What a forward pass adds to one number of the cache.
struct Nudge {
  int layer = 0;
  Part part = Part::kKey;
  int64_t token = 0, channel = 0;
  double amount = 0;
};

class DoubleModel {
 public:
  using Rows = Matrix<double>;

  explicit DoubleModel(const ModelWeights& weights) : w_(weights), f_(weights.facts()) {}

  // Logits (tokens, vocab).
  Rows logits(const std::vector<int32_t>& tokens, const std::vector<Nudge>& nudges = {}) const {
    const int64_t n = static_cast<int64_t>(tokens.size()), d = f_.head_dim, group = f_.q_heads / f_.kv_heads;
    Rows x(n, f_.hidden);
    const Rows embedding = read(Weight::kEmbedding);
    for (int64_t t = 0; t < n; ++t)
      for (int64_t c = 0; c < f_.hidden; ++c) x(t, c) = embedding(tokens[static_cast<size_t>(t)], c);
    for (int l = 0; l < f_.layers; ++l) {
      const Rows in = normed(x, Weight::kAttentionNorm, l, f_.hidden);
      Rows q = product(in, Weight::kQ, Weight::kQBias, l), k = product(in, Weight::kK, Weight::kKBias, l),
           v = product(in, Weight::kV, Weight::kVBias, l);
      if (f_.qk_norm) {
        q = normed(q, Weight::kQNorm, l, d);
        k = normed(k, Weight::kKNorm, l, d);
      }
      add(nudges, l, Part::kKey, k);
      add(nudges, l, Part::kValue, v);
      rotate(q);
      rotate(k);
      add(nudges, l, Part::kRotatedKey, k);
      Rows attended(n, f_.q_heads * d);
      for (int64_t h = 0; h < f_.q_heads; ++h)
        for (int64_t t = 0; t < n; ++t) {
          std::vector<double> p;
          double total = 0;
          for (int64_t s = 0; s <= t; ++s) {
            double score = 0;
            for (int64_t c = 0; c < d; ++c) score += q(t, h * d + c) * k(s, h / group * d + c);
            p.push_back(std::exp(score / std::sqrt(static_cast<double>(d))));
            total += p.back();
          }
          for (int64_t s = 0; s <= t; ++s)
            for (int64_t c = 0; c < d; ++c)
              attended(t, h * d + c) += p[static_cast<size_t>(s)] / total * v(s, h / group * d + c);
        }
      add_to(x, product(attended, Weight::kO, Weight::kOBias, l));
      const Rows between = normed(x, Weight::kFfnNorm, l, f_.hidden);
      Rows gate = product(between, Weight::kGate, Weight::kGate, l);
      const Rows up = product(between, Weight::kUp, Weight::kUp, l);
      for (size_t i = 0; i < gate.storage.size(); ++i)
        gate.storage[i] *= up.storage[i] / (1 + std::exp(-gate.storage[i]));
      add_to(x, product(gate, Weight::kDown, Weight::kDown, l));
    }
    return product(normed(x, Weight::kFinalNorm, 0, f_.hidden), Weight::kHead, Weight::kHead, 0);
  }

 private:
  const Rows& read(Weight weight, int layer = 0) const {
    Rows& kept = read_[{weight, layer}];
    if (kept.rows == 0) {
      const Matrix<float> m = w_.read(weight, layer);
      kept = Rows(m.rows, m.cols);
      for (size_t i = 0; i < m.storage.size(); ++i) kept.storage[i] = m.storage[i];
    }
    return kept;
  }
  // x * W^T + bias, where `bias` is another weight that the model has.
  Rows product(const Rows& x, Weight weight, Weight bias, int layer) const {
    const Rows& w = read(weight, layer);
    const bool biased = bias != weight && w_.has(bias);
    Rows y(x.rows, w.rows);
    for (int64_t t = 0; t < x.rows; ++t)
      for (int64_t r = 0; r < w.rows; ++r) {
        double sum = biased ? read(bias, layer)(0, r) : 0;
        for (int64_t c = 0; c < w.cols; ++c) sum += x(t, c) * w(r, c);
        y(t, r) = sum;
      }
    return y;
  }
  // RMSNorm of every `width` channels.
  Rows normed(Rows x, Weight weight, int layer, int64_t width) const {
    const Rows& w = read(weight, layer);
    for (int64_t t = 0; t < x.rows; ++t)
      for (int64_t h = 0; h < x.cols; h += width) {
        double sum = 0;
        for (int64_t c = 0; c < width; ++c) sum += x(t, h + c) * x(t, h + c);
        const double scale = 1 / std::sqrt(sum / static_cast<double>(width) + f_.norm_eps);
        for (int64_t c = 0; c < width; ++c) x(t, h + c) *= scale * w(0, c);
      }
    return x;
  }
  void rotate(Rows& x) const {
    const int64_t half = f_.rope.rotary_dim / 2;
    for (int64_t t = 0; t < x.rows; ++t)
      for (int64_t h = 0; h < x.cols; h += f_.head_dim)
        for (int64_t p = 0; p < half; ++p) {
          const double angle = static_cast<double>(t) * f_.rope.inverse_frequency[static_cast<size_t>(p)],
                       cosine = f_.rope.attention_factor * std::cos(angle),
                       sine = f_.rope.attention_factor * std::sin(angle), a = x(t, h + p), b = x(t, h + p + half);
          x(t, h + p) = a * cosine - b * sine;
          x(t, h + p + half) = a * sine + b * cosine;
        }
  }
  static void add(const std::vector<Nudge>& nudges, int layer, Part part, Rows& rows) {
    for (const Nudge& n : nudges)
      if (n.layer == layer && n.part == part) rows(n.token, n.channel) += n.amount;
  }
  static void add_to(Rows& x, const Rows& y) {
    for (size_t i = 0; i < x.storage.size(); ++i) x.storage[i] += y.storage[i];
  }

  const ModelWeights& w_;
  const ModelFacts& f_;
  mutable std::map<std::pair<Weight, int>, Rows> read_;
};

}  // namespace vqkv::testing
