// One map of every kind.
#pragma once
#include <string>
#include <utility>
#include <vector>

#include "codec/linear_map.h"
#include "core/rng.h"

namespace vqkv::test {

inline constexpr int kChannels = 16;  // two heads of 8

inline std::vector<float> numbers(size_t n, uint64_t seed) {
  Rng rng(seed);
  std::vector<float> v(n);
  for (float& f : v) f = static_cast<float>(rng.normal());
  return v;
}

struct Named {
  std::string name;
  LinearMap map;
  int rows = kChannels;
};

inline BlockMap blocks(std::initializer_list<std::pair<int, int>> shapes, uint64_t seed) {
  BlockMap m;
  for (const auto& [rows, cols] : shapes)
    m.blocks.push_back({rows, cols, numbers(static_cast<size_t>(rows * cols), seed++)});
  return m;
}

// Every kind, as a plan's map: (rows, 16).
inline std::vector<Named> all_kinds() {
  std::vector<int32_t> kept(kChannels, -1), turned(kChannels);
  for (const auto& [from, to] : {std::pair{0, 1}, {1, 4}, {2, 7}, {3, 8}, {4, 9}, {5, 15}})
    kept[static_cast<size_t>(to)] = from;
  for (int i = 0; i < kChannels; ++i) turned[static_cast<size_t>(i)] = kChannels - 1 - i;
  return {{"identity", IdentityMap{}},
          {"diagonal", DiagonalMap{numbers(16, 1)}},
          {"pruned", GatherMap{6, kept, {}}, 6},
          {"pruned and scaled", GatherMap{6, kept, numbers(16, 2)}, 6},
          {"turned round", GatherMap{16, turned, {}}},
          {"heads", blocks({{8, 8}, {8, 8}}, 3)},
          {"unequal blocks", blocks({{3, 4}, {2, 8}, {1, 4}}, 6), 6},
          {"Hadamard", HadamardMap{16, 8, {}, {}}},
          {"Hadamard, scaled on both sides", HadamardMap{16, 4, numbers(16, 9), numbers(16, 10)}},
          {"Hadamard over heads", HadamardMap{16, 16, {}, {}}},
          {"dense", DenseMap{5, 16, numbers(80, 11)}, 5}};
}

}  // namespace vqkv::test
