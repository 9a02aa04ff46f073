// QuantSpec: the model drafts for itself, over the upper nibbles of its own cache and, where asked, with 4-bit weights;
// one pass over whole codes then judges all drafts.
//
// A round at n tokens, the last drawn token waiting: drafts append their keys and values as tentative tokens, which go
// again before the target's block overwrites them, and what of that block stands is committed. Nothing is coded in
// between, so no code is ever taken back, and the cache after a round is that of its tokens one at a time. A round ends
// before a query that would see more tokens coded than are: there the target alone codes first, and so does the commit.
// So each row of logits is the target's own, and drawing from them in order gives its text, greedy or sampled.
#include <fmt/format.h>

#include <algorithm>

#include "cache/model.h"
#include "core/error.h"
#include "generation/decoding.h"
#include "generation/strategies/strategy.h"

namespace vqkv {
namespace {

constexpr int kDraftStages = 1;  // the upper nibbles

struct QuantSpecKnobs {
  int gamma = 4;
  std::string draft_weights = "mlp";
  int weight_group = 128;
  KnobTable table() {
    return KnobTable()
        .integer("gamma", &gamma, 1, 64, "tokens that are drafted a round, at most")
        .choice("draft_weights", &draft_weights, {"same", "mlp", "layers"},
                "of the draft: the target's, or 4 bits in the matrices of the MLPs or of all layers")
        .integer("weight_group", &weight_group, 1, 65536, "inputs that share a scale of 4-bit weights");
  }
};

class QuantSpec final : public Strategy {
 public:
  explicit QuantSpec(const QuantSpecKnobs& knobs) : knobs_(knobs) {}

  std::shared_ptr<const CacheModel> cache_model(std::shared_ptr<const CodecSet> codecs,
                                                const CachePolicy& policy) const override {
    require_rollback("quantspec", policy);
    for (const Role role : {Role::kKey, Role::kValue})
      if (policy.rule(role).flush < 2)
        fail_usage(
            fmt::format("strategy quantspec: cache.{} codes a token at every step, and coded tokens can't be taken "
                        "back; a rule with a flush above gamma lets it draft",
                        role_name(role)));
    return std::make_shared<const CacheModel>(std::move(codecs), kDraftStages);
  }

  Generated generate(ModelRuntime& model, Sequence& sequence, std::span<const int32_t> prompt,
                     const GenerateOptions& options, const std::function<bool(int32_t)>& on_token,
                     StrategyCounts& counts) override {
    std::unique_ptr<ModelRuntime> rounded;
    if (knobs_.draft_weights != "same")
      rounded =
          model.draft(knobs_.draft_weights == "mlp" ? DraftWeights::kMlp : DraftWeights::kLayers, knobs_.weight_group);
    ModelRuntime& draft = rounded ? *rounded : model;
    KvSession& kv = sequence.session();
    const CompressedCache& cache = sequence.cache();
    Decoding text(model, kv, prompt, options, on_token);
    Matrix<float> guess(1, model.facts().vocab), logits(knobs_.gamma + 1, model.facts().vocab);
    for (bool more = text.begin(); more;) {
      const int64_t held = cache.length();
      kv.speculate();
      std::vector<int32_t> block{text.last()};
      // The target draws one token more than was drafted.
      const int64_t drafts = std::min({int64_t{knobs_.gamma}, cache.block_limit() - 1, text.left() - 1});
      for (int64_t i = 0; i < drafts; ++i) {
        counts.draft.add(draft.weight_bytes(), cache.reads(1, true));
        draft.forward(std::span(&block.back(), 1), kv, LogitRows::kLast, guess, Visibility::kDraft);
        block.push_back(most_likely(guess.storage));
      }
      kv.truncate(held);
      const auto rows = static_cast<int64_t>(block.size());
      counts.target.add(model.weight_bytes(), cache.reads(rows));
      model.forward(block, kv, LogitRows::kAll, logits.view().slice_rows(0, rows));
      text.count_step();
      // Accepted drafts: what was drawn is what was drafted, so the next row stands too.
      int64_t accepted = 0;
      while ((more = text.draw(logits.row(accepted))) && accepted < drafts &&
             text.last() == block[static_cast<size_t>(accepted + 1)])
        ++accepted;
      // Where the text ends, its last draw judges a draft, too, and none behind that one was judged.
      const bool ended = !more && accepted < drafts;
      counts.drafted += ended ? accepted + 1 : drafts;
      counts.accepted += accepted + (ended && text.last_drawn() == block[static_cast<size_t>(accepted + 1)] ? 1 : 0);
      kv.commit(held + 1 + accepted);
    }
    return text.finish();
  }

 private:
  QuantSpecKnobs knobs_;
};

StrategyInfo describe_quantspec_strategy() {
  StrategyInfo info;
  info.name = "quantspec";
  info.title = "self-speculation: drafts from the upper half of each code, verified exactly in one pass";
  info.paper =
      "Tiwari et al., QuantSpec: Self-Speculative Decoding with Hierarchical Quantized KV Cache, ICML 2025, arXiv "
      "2502.10424";
  info.bibtex = "tiwari2025quantspec";
  info.bits =
      "(gamma first-level bits + whole bits) / accepted tokens of a round: with codec quantspec 4 + 32 / group a "
      "draft, "
      "8 + 32 / group a verification";
  info.caveat =
      "for codes with levels, as codec quantspec; drafts are greedy; a round is cut where tokens are coded next, and "
      "acceptance counts the drafts that were made; text ends where the target's does";
  info.assumed =
      "with a temperature a draft stands where the target draws the same token, which keeps the target's text: the "
      "paper's rule for sampling is unconfirmed, as is how it chose its 4-bit weights, which are rounded to nearest "
      "here, and the gamma of each of its rows";
  return info;
}

}  // namespace

VQKV_DEFINE_STRATEGY(quantspec, QuantSpecKnobs, QuantSpec, describe_quantspec_strategy)

}  // namespace vqkv
