// The merges of byte-pair encoding: which two adjacent tokens become which one, the lowest rank first. Private to
// lib/model.
#pragma once
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "model/tokenizer_data.h"

namespace vqkv {

class BpeMerges {
 public:
  // kBadData that names data.where: no merges, a merge whose parts or result are not in `ids`, one that stands twice.
  void read(const TokenizerData& data, const std::unordered_map<std::string, int32_t>& ids);
  // Merges the tokens of one word, the leftmost pair first among equals, and appends what is left: n log n, also for a
  // word of a megabyte.
  void apply(const std::vector<int32_t>& word, std::vector<int32_t>& out) const;

 private:
  struct Merge {
    int32_t rank, result;
  };
  std::unordered_map<uint64_t, Merge> merges_;
};

}  // namespace vqkv
