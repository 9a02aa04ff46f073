// SnapKV: at the end of a prompt each head keeps the tokens that the last queries attended to, pooled over neighbours.
#include <fmt/format.h>

#include <algorithm>

#include "cache/policies/ruled.h"
#include "config/config.h"

namespace vqkv {
namespace {

struct SnapKvKnobs {
  double budget = 1024;
  int observe = 32, kernel = 7, interval = 1024;
  std::string pooling = "max";
  KnobTable table() {
    return KnobTable()
        .real(
            "budget", &budget, 0, 1 << 24,
            "tokens that a head keeps beside the sinks, the observing ones included; below 1 a fraction of the tokens "
            "so far, but never less than the observing ones")
        .integer("observe", &observe, 1, 1 << 16, "newest queries that are asked; their tokens stay")
        .integer("kernel", &kernel, 1, 1025, "neighbouring tokens that are pooled, an odd number")
        .choice("pooling", &pooling, {"max", "avg"}, "how; avg counts tokens beyond the ends as zeros")
        .integer(
            "interval", &interval, 1, 1 << 24,
            "tokens between decisions where no prompt is seen exactly, at least `observe`; with one, its end is the "
            "only decision");
  }
  void check(const std::string& path) const {
    check_budget(budget, path + ".budget");
    if (budget >= 1 && budget < observe)
      fail_expected(path + ".budget", fmt::format("a fraction below 1, or at least the {} observing tokens", observe),
                    budget);
    if (observe > interval)
      fail_expected(path + ".observe", fmt::format("at most the {} tokens of {}.interval", interval, path), observe);
    if (kernel % 2 == 0) fail_expected(path + ".kernel", "an odd number", kernel);
  }
};

class SnapKvRule final : public KeepRule {
 public:
  explicit SnapKvRule(const SnapKvKnobs& knobs) : knobs_(knobs) {}
  std::string text() const override {
    return fmt::format("snapkv: budget {}, {} queries, {} over {}, at an exact prompt's end or every {}", knobs_.budget,
                       knobs_.observe, knobs_.pooling, knobs_.kernel, knobs_.interval);
  }
  int64_t next_decision(int64_t length, int64_t prompt) const override {
    if (prompt > 0) return length < prompt ? prompt : kNever;
    return (length / knobs_.interval + 1) * knobs_.interval;
  }
  int64_t observed_from(int64_t length) const override { return length - knobs_.observe; }
  bool accumulates() const override { return false; }
  int64_t kept(int64_t length) const override {
    return std::max<int64_t>(budget_tokens(knobs_.budget, length), knobs_.observe);
  }
  std::vector<int64_t> give_up(std::span<const int32_t> positions, std::span<const double> received, int64_t length,
                               int64_t sinks) const override {
    // The tokens before the observing ones, sinks included: neighbours of others.
    const int64_t before =
        std::lower_bound(positions.begin(), positions.end(), length - knobs_.observe) - positions.begin();
    const int64_t reach = knobs_.kernel / 2;
    std::vector<double> pooled(static_cast<size_t>(before));
    std::vector<int64_t> columns;
    for (int64_t c = 0; c < before; ++c) {
      const auto from = received.begin() + std::max<int64_t>(0, c - reach),
                 to = received.begin() + std::min(before, c + reach + 1);
      double value = 0;
      if (knobs_.pooling == "max") {
        value = *std::max_element(from, to);
      } else {
        for (auto at = from; at != to; ++at) value += *at;
        value /= knobs_.kernel;
      }
      pooled[static_cast<size_t>(c)] = value;
      if (positions[static_cast<size_t>(c)] >= sinks) columns.push_back(c);
    }
    return all_but_highest(columns, pooled,
                           std::max<int64_t>(0, budget_tokens(knobs_.budget, length) - knobs_.observe));
  }

 private:
  SnapKvKnobs knobs_;
};

class SnapKv final : public RuledKind<SnapKvKnobs, SnapKvRule> {
 public:
  PolicyInfo describe() const override {
    return {.name = "snapkv",
            .title = "each head keeps what the last queries of a prompt attend to, pooled over neighbours",
            .paper = "Li et al., NeurIPS 2024, arXiv 2404.14469",
            .bits = "(sinks + budget) / T of 16 or the codec's at the end of the prompt, and what is generated",
            .caveat =
                "what is generated is never given up; without an exact prompt (mode forced) it decides every "
                "`interval` tokens instead; pools after the sum over the query heads of a group; a trace holds "
                "some queries alone, so it replays and generates but is not swept"};
  }
};

}  // namespace

VQKV_DEFINE_POLICY(snapkv, SnapKv)

}  // namespace vqkv
