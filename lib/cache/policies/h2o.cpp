// H2O: each head keeps the tokens that received most attention since they came, and the newest ones.
//
// Sums run over the queries as they come; the code of the paper's language-model runs sums over whole texts, queries
// after the prediction included. Group queries sum over the query heads of a KV head.
#include <fmt/format.h>

#include "cache/policies/ruled.h"

namespace vqkv {
namespace {

struct H2oKnobs {
  double heavy = 0.1, recent = 0.1;
  int interval = 64;
  KnobTable table() {
    return KnobTable()
        .real("heavy", &heavy, 0, 1 << 24,
              "tokens that a head keeps for what they received, beside sinks and `recent`; below 1 a fraction of the "
              "tokens so far")
        .real("recent", &recent, 0, 1 << 24, "newest tokens that stay whatever they received; below 1 a fraction")
        .integer("interval", &interval, 1, 1 << 24,
                 "tokens between decisions (after a prompt that is seen exactly: from its end on); 1 decides at each");
  }
  void check(const std::string& path) const {
    check_budget(heavy, path + ".heavy");
    check_budget(recent, path + ".recent");
  }
};

class H2oRule final : public KeepRule {
 public:
  explicit H2oRule(const H2oKnobs& knobs) : knobs_(knobs) {}
  std::string text() const override {
    return fmt::format("h2o: heavy {}, recent {}, every {}", knobs_.heavy, knobs_.recent, knobs_.interval);
  }
  int64_t next_decision(int64_t length, int64_t prompt) const override {
    if (length < prompt) return prompt;
    return prompt + ((length - prompt) / knobs_.interval + 1) * knobs_.interval;
  }
  int64_t observed_from(int64_t) const override { return 0; }
  bool accumulates() const override { return true; }
  int64_t kept(int64_t length) const override {
    return budget_tokens(knobs_.heavy, length) + budget_tokens(knobs_.recent, length);
  }
  std::vector<int64_t> give_up(std::span<const int32_t> positions, std::span<const double> received, int64_t length,
                               int64_t sinks) const override {
    const int64_t recent = length - budget_tokens(knobs_.recent, length);
    std::vector<int64_t> old;
    for (size_t c = 0; c < positions.size(); ++c)
      if (positions[c] >= sinks && positions[c] < recent) old.push_back(static_cast<int64_t>(c));
    return all_but_highest(old, received, budget_tokens(knobs_.heavy, length));
  }

 private:
  H2oKnobs knobs_;
};

class H2o final : public RuledKind<H2oKnobs, H2oRule> {
 public:
  PolicyInfo describe() const override {
    return {.name = "h2o",
            .title = "heavy hitters: each head keeps what received most attention so far, and the newest tokens",
            .paper = "Zhang et al., NeurIPS 2023, arXiv 2306.14048",
            .bits = "(sinks + heavy + recent) / T of 16 or the codec's, and 64 / (2 head_dim) of sums for each of them",
            .caveat =
                "sums favour early tokens, which more queries saw; needs what every query attends to, so it "
                "replays and generates but is not swept: a trace holds some queries; a second pass over keys a "
                "query; its sums (8 bytes a token and head) stand under workspace"};
  }
};

}  // namespace

VQKV_DEFINE_POLICY(h2o, H2o)

}  // namespace vqkv
