// What a plan's QueryForm makes of the queries that meet its coded keys.
#pragma once
#include <vector>

#include "codec/plan.h"

namespace vqkv {

// The queries of one head. Every attention path and every metric takes them from here, so that none of them rounds
// another way.
class CodedQueries {
 public:
  CodedQueries() = default;  // exact
  // head: within the unit of the plan, which check_plan accepts.
  CodedQueries(const DecodePlan& plan, int head, int head_dim);

  bool exact() const { return form_ == QueryForm::kExact; }
  // q (head_dim), after RoPE and without the score scale -> y (head_dim): the rounded query of the code domain, whose
  // product with what codes are there, without the map, is the logit. Not for exact ones.
  void in_codes(const float* q, float* y) const;
  // The same in the domain of keys: y * map, whose product with a decoded key is the logit.
  void in_keys(const float* q, float* x) const;

 private:
  QueryForm form_ = QueryForm::kExact;
  int head_dim_ = 0;
  int block_ = 1;                      // of the Hadamard matrix; 1: none
  std::vector<float> before_, after_;  // its signs, (head_dim) or empty
};

// x (n), n a multiple of 32, as ggml's q8_0 holds it: scale max|x| / 127 in float16, integers by the float32 scale,
// halves away from zero (quantize_row_q8_0_ref of ggml/src/ggml-quants.c, ggml-org/llama.cpp 01243c58; its vector units
// round halves to even). What is not finite makes its block NaN or infinite.
void round_q8_0(float* x, int n);

}  // namespace vqkv
