// A small trace with structure, for tests of the sweep: correlated channels, one outlier channel, attention sinks of
// another size, queries that look along the keys, so that codecs differ and coarser is worse.
#pragma once
#include <algorithm>
#include <cmath>
#include <functional>
#include <string>

#include "core/rng.h"
#include "io/trace.h"
#include "support/test_folder.h"

namespace vqkv {

inline void write_sweep_trace(const std::string& path, int documents = 5, int64_t tokens = 160, int layers = 2,
                              int kv_heads = 2, int head_dim = 16, uint64_t seed = 1, int64_t first_document = 0,
                              const RopeFacts* rope = nullptr, const std::function<void(TraceWindowData&)>& edit = {},
                              int64_t every = 8, const std::string& gradients = "",
                              const std::vector<std::string>& token_types = {}) {
  TraceInfo info;
  info.gradients = gradients;
  info.token_types = token_types;
  CacheShape& s = info.shape;
  s.layers = layers;
  s.kv_heads = kv_heads;
  s.q_heads = 2 * kv_heads;
  s.head_dim = head_dim;
  s.rope = rope ? *rope : RopeFacts::plain(head_dim, head_dim, 10000.0);
  s.score_scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  info.hidden = 24;
  info.stored = DType::kBF16;
  info.model_name = "synthetic";
  info.model_hash = std::string(64, 'b');
  info.model = {{"architecture", "synthetic"}};
  info.provenance = {{"tool", "test"}};
  std::vector<std::string> names;
  for (int i = 0; i < documents; ++i) names.push_back("doc" + std::to_string(i) + ".txt");
  TraceWriter writer(path, info, names, documents * tokens, documents * tokens / every);
  const Rng root(seed);
  const auto fill = [&](Matrix<float>& m, Rng rng, Rng shape, double outlier) {
    // Channel scales and a shared direction a head are drawn once (`shape`), rows from `rng`.
    std::vector<double> scale, direction;
    for (int64_t c = 0; c < m.cols; ++c) {
      scale.push_back(0.3 + shape.uniform());
      direction.push_back(shape.normal());
    }
    scale[1] *= outlier;
    for (int64_t r = 0; r < m.rows; ++r) {
      const double common = rng.normal();
      for (int64_t c = 0; c < m.cols; ++c)
        m(r, c) = static_cast<float>(scale[static_cast<size_t>(c)] * rng.normal() +
                                     common * direction[static_cast<size_t>(c)]);
    }
  };
  const int64_t longest = tokens;
  for (int doc = 0; doc < documents; ++doc) {
    // The first document may be shorter than the others.
    tokens = doc == 0 && first_document > 0 ? first_document : longest;
    const int64_t queries = tokens / every;
    TraceWindowData w;
    w.document = doc;
    Rng ids = root.split(900 + static_cast<uint64_t>(doc));
    for (int64_t t = 0; t < tokens; ++t) {
      w.token_id.push_back(static_cast<int32_t>(ids.below(1000)));
      w.position.push_back(static_cast<int32_t>(t));
      if (!token_types.empty()) w.token_type.push_back(0);
    }
    for (int64_t q = 0; q < queries; ++q) w.query_token.push_back(static_cast<int32_t>(q * every + every - 1));
    for (int l = 0; l < layers; ++l) {
      const Rng rng = root.split(1000 + static_cast<uint64_t>(doc) * 100 + static_cast<uint64_t>(l));
      const Rng shape = root.split(static_cast<uint64_t>(l));
      w.key.emplace_back(tokens, kv_heads * head_dim);
      w.value.emplace_back(tokens, kv_heads * head_dim);
      w.query.emplace_back(queries, s.q_heads * head_dim);
      fill(w.key.back(), rng.split(0), shape.split(0), 8);
      fill(w.value.back(), rng.split(1), shape.split(1), 1);
      fill(w.query.back(), rng.split(2), shape.split(2), 1);
      std::vector<double> moment(static_cast<size_t>(kv_heads * head_dim * head_dim), 0.0),
          pairs(static_cast<size_t>(kv_heads * head_dim / 2), 1.0);
      for (int h = 0; h < kv_heads; ++h)
        for (int c = 0; c < head_dim; ++c) moment[static_cast<size_t>((h * head_dim + c) * head_dim + c)] = 1.0 + c;
      w.query_moment.push_back(moment);
      w.query_pair_moment.push_back(pairs);
      w.received_mass.emplace_back(static_cast<size_t>(kv_heads * tokens), 0.5f);
      w.received_mass2.emplace_back(static_cast<size_t>(kv_heads * tokens), 0.25f);
      // Token t's square is t + 1, a hundred times that after RoPE, and a thousandth in channels of negative values.
      for (size_t of = 0; !gradients.empty() && of < std::size(kGradientsOf); ++of) {
        const Matrix<float>& x = of < 2 ? w.key.back() : w.value.back();
        Matrix<float> square(tokens, x.cols);
        for (int64_t t = 0; t < tokens; ++t)
          for (int64_t c = 0; c < x.cols; ++c)
            square(t, c) = static_cast<float>(t + 1) * (of == 1 ? 100.0f : 1.0f) * (x(t, c) < 0 ? 1e-3f : 1.0f);
        w.squared_gradient[of].push_back(std::move(square));
        w.gradient_moment[of].push_back(moment);
      }
    }
    if (edit) edit(w);
    writer.add(w);
  }
  for (int l = 0; l < layers; ++l) {
    Matrix<float> w_o(info.hidden, s.q_heads * head_dim);
    Rng rng = root.split(5000 + static_cast<uint64_t>(l));
    for (auto& v : w_o.storage) v = static_cast<float>(rng.normal());
    writer.output_weight(l, w_o);
  }
  writer.finish();
}

// An `edit` for a trace of types text and image: tokens [begin, end) of every window, or as many as it has, are an
// image.
inline std::function<void(TraceWindowData&)> image_at(int64_t begin, int64_t end) {
  return [=](TraceWindowData& w) {
    for (int64_t t = begin; t < std::min(end, std::ssize(w.token_type)); ++t) w.token_type[static_cast<size_t>(t)] = 1;
  };
}

}  // namespace vqkv
