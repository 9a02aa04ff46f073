#include "cache/keep_rule.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>

#include "cache/map.h"
#include "config/config.h"
#include "core/error.h"

namespace vqkv {

std::vector<int64_t> all_but_highest(std::span<const int64_t> columns, std::span<const double> score, int64_t keep) {
  std::vector<int64_t> order(columns.begin(), columns.end());
  if (static_cast<int64_t>(order.size()) <= keep) return {};
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return score[static_cast<size_t>(a)] > score[static_cast<size_t>(b)]; });
  order.erase(order.begin(), order.begin() + keep);
  std::sort(order.begin(), order.end());
  return order;
}

int64_t budget_tokens(double budget, int64_t length) {
  return static_cast<int64_t>(budget < 1 ? std::floor(budget * static_cast<double>(length)) : budget);
}

void check_budget(double budget, const std::string& path) {
  if (budget >= 1 && budget != std::floor(budget))
    fail_expected(path, "a fraction below 1 of the tokens so far, or a whole number of tokens", budget);
}

int64_t SequenceMap::seen_tokens(int layer, int head) const {
  const EvictedSet& gone = evicted_set(layer, head);
  int64_t lost = 0;
  for (int64_t w = 0; w < gone.count; ++w) lost += std::popcount(gone.words[w]);
  return total() - lost;
}

MassRequest SequenceMap::observe(int layer) {
  MassRequest request;
  if (!policy.keep) return request;
  request.from = std::max(length, policy.keep->observed_from(next_decision()));
  request.to = total();
  if (request.from >= request.to) return {};
  const int heads = model->shape().kv_heads;
  for (int h = 0; h < heads; ++h) {
    MassSums& m = mass[static_cast<size_t>(layer * heads + h)];
    const int64_t seen = seen_tokens(layer, h);
    resize_sums(m, seen);
    request.received.emplace_back(m.sums, static_cast<size_t>(seen));
  }
  observed = request.to;
  return request;
}

void SequenceMap::decide(int layer) {
  const int heads = model->shape().kv_heads;
  for (int h = 0; h < heads; ++h) {
    MassSums& m = mass[static_cast<size_t>(layer * heads + h)];
    const std::vector<int32_t> positions = seen(layer, h, total());
    if (m.count != static_cast<int64_t>(positions.size()))
      fail_internal(
          fmt::format("layer {}, KV head {}: a policy decides at {} tokens, and no attention said what they "
                      "received",
                      layer, h, total()));
    for (int64_t c = 0; c < m.count; ++c)
      if (!std::isfinite(m.sums[c]))
        fail_data(fmt::format("layer {}, KV head {}: what token {} received is {}; attention is not finite", layer, h,
                              positions[static_cast<size_t>(c)], m.sums[c]));
    const std::vector<int64_t> columns =
        policy.keep->give_up(positions, {m.sums, static_cast<size_t>(m.count)}, total(), policy.sinks);
    std::vector<int64_t> gone;
    for (const int64_t c : columns) gone.push_back(positions[static_cast<size_t>(c)]);
    mark_evicted(layer, h, gone);
    int64_t kept = 0;
    for (int64_t c = 0, next = 0; policy.keep->accumulates() && c < m.count; ++c) {
      if (next < static_cast<int64_t>(columns.size()) && columns[static_cast<size_t>(next)] == c)
        ++next;
      else
        m.sums[kept++] = m.sums[c];
    }
    m.count = static_cast<int32_t>(kept);
    resize_sums(m, kept);
  }
}

}  // namespace vqkv
