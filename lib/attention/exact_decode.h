// Attention of one query a sequence and head over exact rows in pages, on a device: the yardstick of what codes save.
#pragma once
#include <cstdint>

#include "attention/exact_rows.h"
#include "attention/split_states.h"

namespace vqkv {

struct ExactDecode {
  const float* queries = nullptr;  // (sequences, kv_heads, group, head_dim), times log2(e) / sqrt(head_dim)
  const uint16_t* keys = nullptr;  // bf16 or f16: (pages, kv_heads, kDevicePageTokens, head_dim)
  const uint16_t* values = nullptr;
  const int32_t* page_table = nullptr;  // (sequences, most_pages): pages in the order of their tokens
  const int32_t* lengths = nullptr;     // (sequences): tokens, 1 or more
  float* out = nullptr;                 // (sequences, kv_heads, group, head_dim)
  int sequences = 0, kv_heads = 0, group = 0, head_dim = 0, most_pages = 0;
  bool f16 = false;
};

class ExactDecoder {
 public:
  // Contexts are cut into `splits` parts, one a block. kUsage for a head_dim that no kernel is compiled for. A group of
  // more than four query heads reads its rows once for each four of them.
  ExactDecoder(int sequences, int kv_heads, int group, int head_dim, int splits);
  void operator()(const ExactDecode& call);

 private:
  SplitRoom room_;
};

}  // namespace vqkv
