// SpeCache: a low-bit copy of the cache near, the exact pairs of all tokens far. A guess of the next token runs beside
// each token; where the guess attends to most, the exact pairs are fetched before the next token needs them, and stand
// in for their codes. Guesses change what is fetched, never which token is drawn from which logits.
//
// Token and guess are two blocks of one token here, which have the bits of one block of two, and are counted as one
// pass over the weights. The far tier is an exact cache of its own, filled by a tap.
#include <fmt/format.h>

#include <algorithm>
#include <numeric>

#include "cache/ledger.h"
#include "cache/model.h"
#include "cache/recalled.h"
#include "core/error.h"
#include "generation/decoding.h"
#include "generation/sampler.h"
#include "generation/strategies/strategy.h"

namespace vqkv {
namespace {

struct SpeCacheKnobs {
  int pairs = 64;
  KnobTable table() {
    return KnobTable().integer("pairs", &pairs, 0, 1 << 24, "exact pairs that are fetched a step, layer and KV head");
  }
};

class FarTier final : public ModelTap {
 public:
  FarTier(const CacheShape& shape, DType dtype) : cache_(exact_codec_set(shape), CachePolicy::exact(dtype)) {}
  void on_qkv(int layer, int64_t, ConstMatrix, ConstMatrix k, ConstMatrix v) override {
    if (layer == 0) cache_.begin_block(k.rows);
    cache_.append(layer, k, v);
    if (layer + 1 == cache_.shape().layers) cache_.end_block();
  }
  RecalledPairs::Head fetch(int layer, int kv_head, std::vector<int32_t> positions) const {
    const CacheView view(cache_);
    const int64_t n = std::ssize(positions), d = cache_.shape().head_dim;
    RecalledPairs::Head out{std::move(positions), Matrix<float>(n, d), Matrix<float>(n, d)};
    for (int64_t i = 0; i < n; ++i) {
      view.load_keys(layer, kv_head, out.positions[static_cast<size_t>(i)], 1, out.k.row(i), 1);
      view.load_values(layer, kv_head, out.positions[static_cast<size_t>(i)], 1, out.v.row(i), d);
    }
    return out;
  }
  int64_t pair_bytes() const {  // of one token and KV head
    return 2 * cache_.shape().head_dim * static_cast<int64_t>(dtype_size(cache_.policy().exact_dtype));
  }
  int64_t bytes() const { return cache_.bytes().total_sequence(); }

 private:
  CompressedCache cache_;
};

// What one query gave each token, summed over the query heads of a KV head.
class Attended final : public AttentionTap {
 public:
  explicit Attended(const CacheShape& shape)
      : shape_(shape), mass_(static_cast<size_t>(shape.layers * shape.kv_heads)) {}
  void on_probabilities(int layer, int q_head, int64_t, ConstMatrix p) override {
    std::vector<float>& mass = mass_[static_cast<size_t>(layer * shape_.kv_heads + q_head / shape_.group())];
    if (q_head % shape_.group() == 0) mass.assign(static_cast<size_t>(p.cols), 0.0f);
    for (int64_t t = 0; t < p.cols; ++t) mass[static_cast<size_t>(t)] += p(0, t);
  }
  // The positions of [from, to) with most, ascending; equal mass: the lower first.
  std::vector<int32_t> most(int layer, int kv_head, int64_t from, int64_t to, int64_t count) const {
    const std::vector<float>& mass = mass_[static_cast<size_t>(layer * shape_.kv_heads + kv_head)];
    std::vector<int32_t> order(static_cast<size_t>(std::max<int64_t>(0, to - from)));
    std::iota(order.begin(), order.end(), static_cast<int32_t>(from));
    const auto kept = order.begin() + std::min<int64_t>(count, std::ssize(order));
    std::partial_sort(order.begin(), kept, order.end(), [&](int32_t a, int32_t b) {
      const float x = mass[static_cast<size_t>(a)], y = mass[static_cast<size_t>(b)];
      return x != y ? x > y : a < b;
    });
    order.erase(kept, order.end());
    std::sort(order.begin(), order.end());
    return order;
  }

 private:
  CacheShape shape_;
  std::vector<std::vector<float>> mass_;  // (layers * kv_heads), (tokens)
};

// What a session borrows for one block, given back even where the block fails.
struct Tapped {
  KvSession& kv;
  Tapped(KvSession& session, AttentionTap* tap) : kv(session) { kv.set_tap(tap); }
  ~Tapped() { kv.set_tap(nullptr); }
};
struct Recalled {
  KvSession& kv;
  Recalled(KvSession& session, const RecalledPairs* pairs) : kv(session) { kv.recall(pairs); }
  ~Recalled() { kv.recall(nullptr); }
};

class SpeCache final : public Strategy {
 public:
  explicit SpeCache(const SpeCacheKnobs& knobs) : knobs_(knobs) {}

  std::shared_ptr<const CacheModel> cache_model(std::shared_ptr<const CodecSet> codecs,
                                                const CachePolicy& policy) const override {
    require_rollback("specache", policy);
    if (codecs->fit_minimum() > 0)
      fail_usage("strategy specache guesses from the first token on, and a codec that is fitted to each prompt waits");
    auto model = std::make_shared<const CacheModel>(std::move(codecs));
    for (const CacheModel::Unit& u : model->units())
      if (!u.decodes_rows())
        fail_usage(
            fmt::format("strategy specache puts exact rows in place of decoded ones, and what the codec of layer {}, "
                        "role {} decodes are no such rows: keys before RoPE, the layer below's rest, a map that is "
                        "folded into queries, or keys that rounded queries meet",
                        u.shape.layer, role_name(u.shape.role)));
    return model;
  }

  int64_t bytes_beside(const CacheShape& shape, const CachePolicy& policy, int64_t tokens) const override {
    return ledger_at(*exact_codec_set(shape), CachePolicy::exact(policy.exact_dtype), tokens).total_sequence();
  }

  Generated generate(ModelRuntime& model, Sequence& sequence, std::span<const int32_t> prompt,
                     const GenerateOptions& options, const std::function<bool(int32_t)>& on_token,
                     StrategyCounts& counts) override {
    KvSession& kv = sequence.session();
    const CompressedCache& cache = sequence.cache();
    const CacheShape& shape = cache.shape();
    FarTier far(shape, cache.policy().exact_dtype);
    Attended attended(shape);
    RecalledPairs near{shape.kv_heads, {}};
    Matrix<float> logits(1, model.facts().vocab), guess(1, model.facts().vocab);

    // Runs `token` behind what is held, takes it back, fetches what it attended to; the likeliest token behind it.
    const auto look_ahead = [&](int32_t token) {
      const int64_t held = cache.length();
      kv.speculate();
      counts.draft.add(0, cache.reads(1));
      {
        const Tapped tapped(kv, &attended);
        model.forward(std::span(&token, 1), kv, LogitRows::kLast, guess);
      }
      kv.commit(held);
      const int64_t end = std::max(cache.coded_end(Role::kKey, held), cache.coded_end(Role::kValue, held));
      near.heads.clear();
      counts.fetched = 0;
      for (int layer = 0; layer < shape.layers; ++layer)
        for (int h = 0; h < shape.kv_heads; ++h) {
          near.heads.push_back(far.fetch(layer, h, attended.most(layer, h, cache.policy().sinks, end, knobs_.pairs)));
          counts.fetched += std::ssize(near.heads.back().positions) * far.pair_bytes();
        }
      counts.moved += counts.fetched;
      return most_likely(guess.storage);
    };

    Decoding text(model, kv, prompt, options, on_token, &far);
    bool more = text.begin();
    int32_t guessed = -1;
    if (more) {
      counts.draft.weights += model.weight_bytes();  // a pass of its own, before any token is decoded
      guessed = look_ahead(text.last());
    }
    while (more) {
      const int32_t token = text.last();
      CacheReads reads = cache.reads(1);
      reads.exact += counts.fetched;
      counts.target.add(model.weight_bytes(), reads);
      {
        const Recalled recalled(kv, &near);
        model.forward(std::span(&token, 1), kv, LogitRows::kLast, logits, Visibility::kReplay, &far);
      }
      text.count_step();
      more = text.draw(logits.row(0));
      ++counts.drafted;
      counts.accepted += text.last_drawn() == guessed;
      if (more) guessed = look_ahead(guessed);
    }
    counts.far = far.bytes();
    return text.finish();
  }

 private:
  SpeCacheKnobs knobs_;
};

StrategyInfo describe_specache_strategy() {
  StrategyInfo info;
  info.name = "specache";
  info.title = "a low-bit copy near, exact pairs far: a guess of the next token says which to fetch";
  info.paper =
      "Jie et al., SpeCache: Speculative Key-Value Caching for Efficient Generation of LLMs, ICML 2025, arXiv "
      "2503.16163";
  info.bibtex = "jie2025specache";
  info.target = "exact";
  info.bits =
      "near bits + 32 / group, and 16 pairs / T of exact pairs; what comes from the far copy of 16 is counted apart";
  info.caveat =
      "the paper's prompts attend exactly (--exact-prefill); acceptance is the share of guesses that came true, and no "
      "guess saves a pass; every fetch moves all its pairs; far bytes are in no bits/value";
  info.assumed =
      "no code of the authors was found: scores are summed over the query heads of a KV head, and the first pairs are "
      "those of the first token's own query";
  return info;
}

}  // namespace

VQKV_DEFINE_STRATEGY(specache, SpeCacheKnobs, SpeCache, describe_specache_strategy)

}  // namespace vqkv
