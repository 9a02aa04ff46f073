// Every form of plan that a backend can meet.
#pragma once
#include <cmath>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "attention/plan_codec.h"

namespace vqkv::test {

struct Case {
  std::string name;
  std::function<void(DecodePlan&, Role)> build;
  int block_tokens = 1;
  int overlay_every = 0;
  int code_extra = 0;  // code channels beyond the unit's
  int coded_head = 0;  // or: code channels of a head
};

inline std::vector<Case> cases() {
  return {
      {"product code, 8 bits, width 4", [](DecodePlan& p, Role) { add_table(p, 8, 4); }},
      {"product code, 4 bits, width 2", [](DecodePlan& p, Role) { add_table(p, 4, 2); }},
      {"product code, 10 bits of 700 entries, width 8",
       [](DecodePlan& p, Role) { add_table(p, 10, 8, 1, false, false, 700); }},
      {"residual, 3 stages over 16 channels, shared books",
       [](DecodePlan& p, Role) { add_table(p, 6, 16, 3, false, true); }},
      {"strided residual", [](DecodePlan& p, Role) { add_table(p, 7, 8, 2, true, true); }},
      {"product code with bias, map and token scale",
       [](DecodePlan& p, Role) {
         add_table(p, 8, 4);
         add_map(p, 5);
         add_token_scale(p, 1);
         p.inner_bias = random_bias(p.channels, 6);
         p.outer_bias = random_bias(p.channels, 7);
       }},
      {"map to more code channels than channels",
       [](DecodePlan& p, Role) {
         add_table(p, 5, 4);
         add_map(p, 8);
         p.outer_bias = random_bias(p.channels, 3);
       },
       1, 0, 16},
      {"diagonal map and bias",
       [](DecodePlan& p, Role) {
         add_table(p, 8, 8);
         p.map = DiagonalMap{random_bias(p.channels, 9)};
         p.inner_bias = random_bias(p.channels, 10);
         add_token_scale(p, 1);
       }},
      {"scale groups inside a head",
       [](DecodePlan& p, Role) {
         add_table(p, 8, 4);
         add_map(p, 11);
         add_token_scale(p, p.channels / 16);
       }},
      {"levels, per token", [](DecodePlan& p, Role) { add_levels(p, 3, 16, 1, true); }},
      {"levels, token groups", [](DecodePlan& p, Role) { add_levels(p, 2, 1, 16, false); }, 32},
      {"non-uniform levels through a map",
       [](DecodePlan& p, Role) {
         add_levels(p, 4, 8, 32, false, true);
         add_map(p, 12);
       },
       32},
      {"dense channels beside a table",
       [](DecodePlan& p, Role) {
         add_table(p, 8, 4);
         add_dense(p, {1, 5, 6});
       }},
      {"overlay",
       [](DecodePlan& p, Role) {
         add_table(p, 8, 4);
         add_map(p, 13);
       },
       1, 3},
      {"overlay on levels", [](DecodePlan& p, Role) { add_levels(p, 2, 8, 1, true); }, 1, 5},
      {"keys before RoPE",
       [](DecodePlan& p, Role r) {
         add_table(p, 8, 4);
         p.outer_bias = random_bias(p.channels, 4);
         if (r == Role::kKey) p.rope = RopePlacement::kPre;
       }},
      {"keys before RoPE through a map",
       [](DecodePlan& p, Role r) {
         add_table(p, 6, 8, 2);
         add_map(p, 15);
         if (r == Role::kKey) p.rope = RopePlacement::kPre;
       }},
      {"channels gathered from fewer codes",
       [](DecodePlan& p, Role) {
         add_table(p, 6, 4);
         add_gather(p);
         p.outer_bias = random_bias(p.channels, 5);
         add_token_scale(p, 1);
       },
       1, 0, -16},
      {"keys before RoPE gathered from fewer codes, with scales inside a head",
       [](DecodePlan& p, Role r) {
         add_levels(p, 3, 8, 1, true);
         add_gather(p);
         add_token_scale(p, p.channels / 16);
         if (r == Role::kKey) p.rope = RopePlacement::kPre;
       },
       1, 0, -16},
      {"unequal blocks",
       [](DecodePlan& p, Role) {
         add_table(p, 6, 4);
         BlockMap map;
         for (int at = 0; at < p.channels; at += 64)
           for (const auto& [rows, cols] : {std::pair{8, 16}, {40, 48}}) {
             const Matrix<float> m = random_matrix(rows, cols, 40 + static_cast<uint64_t>(at), 0.2);
             map.blocks.push_back({rows, cols, {m.storage.begin(), m.storage.end()}});
           }
         p.map = map;
       },
       1, 0, 0, 48},
      {"Hadamard between signs and a diagonal",
       [](DecodePlan& p, Role) {
         add_table(p, 8, 4);
         p.map = HadamardMap{p.channels, 32, random_bias(p.channels, 21), random_bias(p.channels, 22)};
         p.inner_bias = random_bias(p.channels, 6);
         add_token_scale(p, 1);
       }},
      {"keys before RoPE through Hadamard, with scales inside a head",
       [](DecodePlan& p, Role r) {
         add_levels(p, 3, 16, 1, true);
         p.map = HadamardMap{p.channels, 64, random_bias(p.channels, 23), {}};
         p.outer_bias = random_bias(p.channels, 4);
         add_token_scale(p, p.channels / 32);
         if (r == Role::kKey) p.rope = RopePlacement::kPre;
       }},
      {"Hadamard over all heads of a unit",
       [](DecodePlan& p, Role) {
         add_table(p, 7, 8);
         p.map = HadamardMap{p.channels, p.channels, {}, random_bias(p.channels, 24)};
       }},
      {"signs of every head", [](DecodePlan& p, Role) { add_signs(p, 128, 64); }},
      {"signs of runs of 8 channels, rows that fill no byte", [](DecodePlan& p, Role) { add_signs(p, 76, 8); }},
      {"signs with a token scale",
       [](DecodePlan& p, Role) {
         add_signs(p, 128, 64, 0, false);
         add_token_scale(p, 1);
       }},
      {"signs of runs of 8 channels beside a table, through a map",
       [](DecodePlan& p, Role) {
         add_table(p, 8, 16);
         add_signs(p, 28, 8, 0, false);
         add_map(p, 17);
         p.outer_bias = random_bias(p.channels, 8);
       }},
      {"signs of all heads of a unit together, without a scale",
       [](DecodePlan& p, Role) { add_signs(p, 72, p.channels, 0, false); }},
      {"signs of all heads of a unit together", [](DecodePlan& p, Role) { add_signs(p, 72, p.channels); }},
      {"signs beside outlier channels", [](DecodePlan& p, Role) { add_signs(p, 128, 32, 5); }, 32},
      {"signs beside outlier channels of all heads, keys before RoPE",
       [](DecodePlan& p, Role r) {
         add_signs(p, 96, p.channels, 9);
         if (r == Role::kKey) p.rope = RopePlacement::kPre;
       },
       16},
      {"signs of what levels leave over, through a map, with a token scale",
       [](DecodePlan& p, Role) {
         add_levels(p, 2, 8, 1, true);
         add_signs(p, 64, 64);
         add_map(p, 16);
         add_token_scale(p, 1);
       }},
      {"signs beside a table and dense channels",
       [](DecodePlan& p, Role) {
         add_signs(p, 64, 16, 3);
         add_table(p, 8, 4);
         add_dense(p, {2, 7});
       },
       8},
      {"complex codewords before RoPE, with a token scale",
       [](DecodePlan& p, Role r) {
         if (r == Role::kValue) return add_signs(p, 48, p.channels, 0, false);
         add_pairs(p, 64, 5, 64, 3);
         add_token_scale(p, 1);
       }},
      {"complex codewords before RoPE of no common step, groups of half a head",
       [](DecodePlan& p, Role r) {
         if (r == Role::kValue)
           add_table(p, 8, 4);
         else
           add_pairs(p, 64, 6, 32, 4, false);
       }},
      {"complex codewords before RoPE over all heads of a unit",
       [](DecodePlan& p, Role r) {
         if (r == Role::kValue) return add_table(p, 8, 4);
         add_pairs(p, 64, 4, p.channels, 5);
         add_token_scale(p, 1);
       }},
      {"score map",
       [](DecodePlan& p, Role) {
         add_table(p, 8, 4);
         p.score = {ScoreMap::Kind::kRange, 0.3f, 0.2f};
       }},
      // Levels that are attended where their codes lie.
      {"2-bit levels, channel groups of each token", [](DecodePlan& p, Role) { add_levels(p, 2, 32, 1, true); }},
      {"2-bit levels, token groups of each channel", [](DecodePlan& p, Role) { add_levels(p, 2, 1, 32, false); }, 32},
      {"1-bit levels, groups of 8 channels, through a map with a token scale",
       [](DecodePlan& p, Role) {
         add_levels(p, 1, 8, 1, true);
         add_map(p, 18);
         p.inner_bias = random_bias(p.channels, 6);
         p.outer_bias = random_bias(p.channels, 7);
         add_token_scale(p, 1);
       }},
      {"4-bit levels whose zeros are codes",
       [](DecodePlan& p, Role) {
         add_levels(p, 4, 16, 1, true);
         std::get<LevelsTerm>(p.terms[0]).zero_of_codes = true;
       }},
      {"1-bit non-uniform levels, token groups over 4 channels",
       [](DecodePlan& p, Role) { add_levels(p, 1, 4, 32, false, true); }, 32},
      {"2-bit levels without scales",
       [](DecodePlan& p, Role) {
         add_levels(p, 2, 32, 1, true);
         std::get<LevelsTerm>(p.terms[0]).scale_side = -1;
         std::get<LevelsTerm>(p.terms[0]).zero_side = -1;
       }},
      {"4-bit levels met by rounded queries",
       [](DecodePlan& p, Role r) {
         add_levels(p, 4, 32, 1, true);
         if (r == Role::kKey) p.query = QueryForm::kQ8;
       }},
      {"3-bit levels behind Hadamard with signs, met by rounded queries",
       [](DecodePlan& p, Role r) {
         add_levels(p, 3, 32, 1, true);
         std::vector<float> signs = random_bias(p.channels, 25);
         for (float& s : signs) s = s < 0 ? -1.0f : 1.0f;
         p.map = HadamardMap{p.channels, 64, {}, signs};
         if (r == Role::kKey) p.query = QueryForm::kQ8;
       }},
      {"product code met by rounded queries",
       [](DecodePlan& p, Role r) {
         add_table(p, 8, 4);
         if (r == Role::kKey) p.query = QueryForm::kQ8;
       }},
  };
}

inline std::shared_ptr<const CodecSet> set_of(const Case& c, const CacheShape& shape, int heads) {
  return make_set(shape, heads, [&](Role role, int channels) {
    DecodePlan p = empty_plan(channels, c.block_tokens,
                              c.coded_head   ? c.coded_head * (channels / shape.head_dim)
                              : c.code_extra ? channels + c.code_extra
                                             : 0);
    c.build(p, role);
    return std::make_shared<PlanCodec>(p, c.overlay_every);
  });
}

// fp32 sums of n terms of size s err by about sqrt(n) * 2^-24 * s; logits err by that times |q||k| and enter through
// exp. 64 covers the constants of a softmax over values of unit size, with logits up to 40.
inline double tolerance(double logit_scale, int64_t d) {
  return 64.0 * 0x1p-24 * std::sqrt(static_cast<double>(d)) * (1.0 + logit_scale);
}

}  // namespace vqkv::test
