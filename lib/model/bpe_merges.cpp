#include "model/bpe_merges.h"

#include <fmt/format.h>

#include <queue>

#include "core/error.h"

namespace vqkv {
namespace {

uint64_t pair_key(int32_t left, int32_t right) {
  return uint64_t{static_cast<uint32_t>(left)} << 32 | static_cast<uint32_t>(right);
}

}  // namespace

void BpeMerges::read(const TokenizerData& data, const std::unordered_map<std::string, int32_t>& ids) {
  if (data.merges.empty()) fail_data(data.where + ": a BPE vocabulary without merges");
  merges_.reserve(data.merges.size());
  const auto find = [&](const std::string& part, size_t rank) {
    const auto it = ids.find(part);
    if (it == ids.end()) {
      fail_data(fmt::format("{}: merge {} (\"{}\" + \"{}\"): \"{}\" is not in the vocabulary", data.where, rank,
                            data.merges[rank].first, data.merges[rank].second, part));
    }
    return it->second;
  };
  for (size_t rank = 0; rank < data.merges.size(); ++rank) {
    const auto& [left, right] = data.merges[rank];
    if (left.empty() || right.empty()) fail_data(fmt::format("{}: merge {} has an empty part", data.where, rank));
    const int32_t a = find(left, rank), b = find(right, rank);
    const Merge merge{static_cast<int32_t>(rank), find(left + right, rank)};
    if (const auto [it, fresh] = merges_.emplace(pair_key(a, b), merge); !fresh) {
      fail_data(fmt::format("{}: merge \"{}\" + \"{}\" stands twice: ranks {} and {}", data.where, left, right,
                            it->second.rank, rank));
    }
  }
}

void BpeMerges::apply(const std::vector<int32_t>& word, std::vector<int32_t>& out) const {
  // A linked list of symbols and a heap of candidate merges.
  struct Symbol {
    int32_t id, previous, next;
  };
  struct Candidate {
    int32_t rank, at, result;
    bool operator<(const Candidate& o) const { return rank != o.rank ? rank > o.rank : at > o.at; }
  };
  std::vector<Symbol> symbols;
  symbols.reserve(word.size());
  for (const int32_t id : word) {
    const auto at = static_cast<int32_t>(symbols.size());
    symbols.push_back({id, at - 1, at + 1});
  }
  if (symbols.empty()) return;
  symbols.back().next = -1;
  std::vector<Candidate> storage;
  storage.reserve(symbols.size());
  std::priority_queue<Candidate> heap({}, std::move(storage));
  const auto consider = [&](int32_t at) {
    const int32_t next = at < 0 ? -1 : symbols[static_cast<size_t>(at)].next;
    if (next < 0) return;
    const auto it = merges_.find(pair_key(symbols[static_cast<size_t>(at)].id, symbols[static_cast<size_t>(next)].id));
    if (it != merges_.end()) heap.push({it->second.rank, at, it->second.result});
  };
  for (size_t i = 0; i + 1 < symbols.size(); ++i) consider(static_cast<int32_t>(i));
  while (!heap.empty()) {
    const Candidate best = heap.top();
    heap.pop();
    Symbol& left = symbols[static_cast<size_t>(best.at)];
    if (left.id < 0 || left.next < 0) continue;  // merged away since
    const Symbol right = symbols[static_cast<size_t>(left.next)];
    const auto it = merges_.find(pair_key(left.id, right.id));
    if (it == merges_.end() || it->second.result != best.result) continue;  // the pair is another one by now
    symbols[static_cast<size_t>(left.next)].id = -1;
    left.id = best.result;
    left.next = right.next;
    if (right.next >= 0) symbols[static_cast<size_t>(right.next)].previous = best.at;
    consider(left.previous);
    consider(best.at);
  }
  for (int32_t at = 0; at >= 0; at = symbols[static_cast<size_t>(at)].next) {
    out.push_back(symbols[static_cast<size_t>(at)].id);
  }
}

}  // namespace vqkv
