// Causal attention of blocks of tokens over exact rows in pages, on a device's tensor cores: what reads prompts.
#pragma once
#include <cstdint>

#include "attention/exact_rows.h"

namespace vqkv {

// New tokens of one sequence, at positions [held, held + tokens). Their rows are in its pages already.
struct alignas(16) PrefillBlock {
  int32_t first_row = 0;  // of queries and out
  int32_t tokens = 0;     // 1 or more
  int32_t held = 0;
  int32_t table = 0;  // of its pages
};

struct ExactPrefill {
  const float* queries = nullptr;  // (rows, kv_heads, group, head_dim), times log2(e) / sqrt(head_dim)
  const uint16_t* keys = nullptr;  // bf16 or f16: (pages, kv_heads, kDevicePageTokens, head_dim)
  const uint16_t* values = nullptr;
  const int32_t* page_table = nullptr;     // (tables, most_pages): pages in the order of their tokens
  const PrefillBlock* of_block = nullptr;  // (blocks)
  float* out = nullptr;                    // as queries
  int blocks = 0, kv_heads = 0, group = 0, head_dim = 0, most_pages = 0;
  int longest = 0;  // tokens of the longest block
  bool f16 = false;
};

// Queries and softmax weights are rounded to the type of the rows, sums are fp32. kUsage for a head_dim that no kernel
// is compiled for.
void exact_prefill(const ExactPrefill& call);

}  // namespace vqkv
