// Which tokens a KV head keeps, decided from what they received: the seam of eviction methods (cache/policies/h2o.cpp,
// snapkv.cpp). The query heads of a group share a decision, since they share the rows.
//
// Decisions are made at lengths that the rule names beforehand and hold from there on. Blocks end at them, so a block
// of queries sees what single steps see.
#pragma once
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <vector>

namespace vqkv {

// What a cache asks of attention for its rule: the mass that each token received from the queries at positions
// [from, to), summed over them in order and over the query heads of the group. It costs a second pass over their keys,
// and no more memory than a tile of scores a thread.
struct MassRequest {
  int64_t from = 0, to = 0;
  std::vector<std::span<double>> received;  // by KV head: an element a token of CacheView::seen, added to
};

class KeepRule {
 public:
  virtual ~KeepRule() = default;
  // As a protocol names it: "h2o: heavy 0.1, recent 0.1, every 64".
  virtual std::string text() const = 0;
  // The least length above `length` at which it decides; kNever: not again. `prompt`: the tokens that are seen exactly
  // before anything is coded or lost, 0 without such.
  virtual int64_t next_decision(int64_t length, int64_t prompt) const = 0;
  static constexpr int64_t kNever = std::numeric_limits<int64_t>::max();
  // The first query whose mass counts at the decision at `length`.
  virtual int64_t observed_from(int64_t length) const = 0;
  // Whether what the kept tokens received counts again at the next decision.
  virtual bool accumulates() const = 0;
  // Tokens beside the sinks that a head sees right behind a decision at `length`, where there are so many.
  virtual int64_t kept(int64_t length) const = 0;
  // What one head gives up at `length` tokens: ascending indices into `positions`, the tokens that it still sees,
  // ascending; `received` is as long. The first `sinks` positions stay.
  virtual std::vector<int64_t> give_up(std::span<const int32_t> positions, std::span<const double> received,
                                       int64_t length, int64_t sinks) const = 0;
};

// Of `columns` (ascending), all but the `keep` with the highest score, ties to the lowest column; ascending.
std::vector<int64_t> all_but_highest(std::span<const int64_t> columns, std::span<const double> score, int64_t keep);

// A budget of tokens: a fraction of `length` below 1, itself otherwise.
int64_t budget_tokens(double budget, int64_t length);
// Error (usage): a budget that is neither a fraction nor whole.
void check_budget(double budget, const std::string& path);

}  // namespace vqkv
