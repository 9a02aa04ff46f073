// What a model of the Llama family does to the rows between its products, on a device. The residual stream and the
// results of products are fp32, what goes into the next product is rounded to bf16.
#pragma once
#include <cstdint>

#include "device/runtime.h"

namespace vqkv {

// x (rows, cols) = the rows of table, (vocab, cols) in bf16, that tokens name.
void embed_rows(const int32_t* tokens, const uint16_t* table, int rows, int cols, float* x);

// y = x / sqrt(mean x² + eps) * weight, a row at a time; (rows, cols), cols a multiple of 4.
void norm_rows_bf16(const float* x, const float* weight, float eps, int rows, int cols, uint16_t* y);

// gate_up (rows, 2 * cols): y = gate / (1 + exp(-gate)) * up.
void swiglu_rows_bf16(const float* gate_up, int rows, int cols, uint16_t* y);

// y = x, rounded; n numbers, a multiple of 4.
void round_rows_bf16(const float* x, int64_t n, uint16_t* y);

// x += bias, (cols), a row at a time.
void add_bias_rows(float* x, const float* bias, int rows, int cols);

// What follows the product with W_Q, W_K and W_V.
struct QkvRows {
  float* qkv = nullptr;         // (rows, (q_heads + 2 kv_heads) * head_dim): biased and normed in place, as taps see it
  const float* bias = nullptr;  // as a row of qkv; null: none
  const float* q_norm = nullptr;  // (head_dim): RMS norm of each head; null: none
  const float* k_norm = nullptr;
  float norm_eps = 0;
  // Of each row: cos and sin of its position, (rows, 2, rotary_dim / 2), times the attention factor.
  const float* rotation = nullptr;
  int rows = 0, q_heads = 0, kv_heads = 0, head_dim = 0, rotary_dim = 0;
  float query_scale = 1;     // log2(e) / sqrt(head_dim)
  float* queries = nullptr;  // (rows, q_heads, head_dim), rotated and scaled
  // Rotated keys and values go to their place in pages: of bf16 (ExactDecode), or of f16 (ExactRows).
  uint16_t* keys = nullptr;
  uint16_t* values = nullptr;
  const int32_t* page_table = nullptr;  // (sequences, most_pages)
  const int32_t* sequence = nullptr;    // (rows)
  const int32_t* place = nullptr;       // (rows): among the tokens of the sequence's pages
  int most_pages = 0, page_tokens = 0;
  bool f16 = false;
};
void place_qkv_rows(const QkvRows& call);

// The id of the largest of each row's logits, (rows, vocab); equal ones: the lower.
void most_likely_rows(const float* logits, int rows, int vocab, int32_t* tokens);

}  // namespace vqkv
