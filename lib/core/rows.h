// Rows of numbers, by vectors of the processor: attention's, for every query of every cell of a sweep, and logits.
#pragma once
#include <cstdint>

namespace vqkv {

float largest(const float* x, int64_t n);  // n >= 1
double sum_of(const float* x, int64_t n);  // in fp64

// p (n) = softmax of s (n), n >= 1: exponentials to a unit in the last place of fp32, their sum in fp64. A NaN in s
// makes all of p NaN.
void softmax(const float* s, int64_t n, float* p);

// Of exp(x[j] - from) over j, in fp64; every x[j] - from below 700. A NaN stays one.
double sum_of_exp(const float* x, int64_t n, double from);

// Sums over j of p (a - b - gap) and of |p - q|, in fp64.
struct RowDistance {
  double kl = 0, l1 = 0;
};
RowDistance row_distance(const float* p, const float* q, const float* a, const float* b, double gap, int64_t n);

}  // namespace vqkv
